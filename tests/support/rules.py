"""Settings of rules, and what rules are given."""

import math

import numpy as np
from pydantic import TypeAdapter

from kat_ray.analysis.replay import Traces
from kat_ray.records.traces import TraceRow, write_traces
from kat_ray.termination import NewTokens, TerminationConfig
from kat_ray.termination.settings import KatSettings
from kat_ray.types.records import StopReason

# Of every rule a setting that acts within three steps of short rollouts.
_EARLY = {"min_steps": 1, "buffer": 32}
ACTING = tuple(
    {"probe_share": 0.25, **rule}
    for rule in (
        {"rule": "fixed_prefix", "n": 10},
        {"rule": "random", "longest": 20},
        {"rule": "repetition", "repeats": 2},
        {"rule": "length_matched"},
        {"rule": "progressive", "start": 6, "end": 20, "steps": 2},
        {"rule": "kat", "window": 4, "exempt": 0, "consecutive": 4, "min_samples": 12, **_EARLY, "budget": 0.2},
        {"rule": "kat_stages", "window": 8, "exempt": 4, "consecutive": 2, "min_samples": 4, **_EARLY},
    )
)


def check_acting(rule, traces, generated, longest):
    """That a rule of ACTING did what it is for: a run's traces, and the tokens generated of each rollout."""
    cut, probe = traces.cut >= 0, traces.probe == 1
    match rule:
        case "progressive":
            budget = np.array([6, 13, 20])[traces.step]
            assert (generated[~probe] <= budget[~probe]).all() and (generated[probe] > budget[probe]).any()
        case "kat_stages":
            assert not cut.any() and (traces.would_cut[probe] >= 0).any()
        case _:
            assert cut.sum() > 3 and not cut[probe].any()
            assert (generated[cut] < longest).any(), "the engine was stopped"


def kl(values):
    """New tokens of which only the KL is known."""
    return NewTokens(np.asarray(values, dtype=np.float64))


def rule_of(**changes):
    few = {"window": 4, "consecutive": 2, "exempt": 0, "min_samples": 1, "min_steps": 0, "budget": None}
    return KatSettings(**few | changes)


def settings_from(**fields):
    return TypeAdapter(TerminationConfig).validate_python(fields)


def recorded_run(path, steps):
    """A run whose rollouts are (length, cut, probe), step by step; a step without a cut was not active."""
    (path / "traces").mkdir(parents=True)
    for step, rollouts in enumerate(steps):
        active = any(cut is not None for _, cut, _ in rollouts)
        rows = [
            TraceRow(
                rollout_id=i, prompt_id="p", step=step, policy_version=step, token_ids=np.zeros(length, np.int32),
                d=np.zeros(length, np.float32), stop_reason=StopReason.EOS, cut=cut, confirmed=None,
                threshold=0.5 if active else None, probe=probe, minimum=None, would_cut=None, correct=None,
            )
            for i, (length, cut, probe) in enumerate(rollouts)
        ]  # fmt: skip
        write_traces(path / "traces", step, rows)
    return str(path)


def traces_of(values, thresholds=None, steps=None, correct=None, probe=None, trapped=None):
    count = len(values)
    flat = np.array([x for v in values for x in v], dtype=np.float32).astype(np.float64)
    column = lambda given, default: np.array(given if given is not None else [default] * count)  # noqa: E731
    return Traces(
        d=flat, offsets=np.cumsum([0, *map(len, values)]).astype(np.int64), step=column(steps, 0),
        rollout_id=np.arange(count), full=column(None, False),
        threshold=column(thresholds, math.nan), probe=column(probe, False), trapped=column(trapped, False),
        cut=column(None, -1), would_cut=column(None, -1), correct=column(correct, -1),
    )  # fmt: skip
