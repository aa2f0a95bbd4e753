"""What a run's rewards were worth, computed again from its traces by the run's own algorithm, or by another one.

No model is loaded: an advantage depends on rewards, on how rollouts ended and on their lengths, which traces
hold. Steps are taken in order, by one algorithm, as the driver took them, for what it remembers between them.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from kat_ray.algorithms.base import Credit, EndedStep, RolloutCredit
from kat_ray.algorithms.choice import algorithm_of, check_rule
from kat_ray.analysis.replay import load_table, with_changes
from kat_ray.config import Config
from kat_ray.config.load import section_error
from kat_ray.data.accounting import FinishedRollout, count_tokens
from kat_ray.data.prompt_order import given_places
from kat_ray.errors import UserError
from kat_ray.types.records import FloatArray, Reward, RolloutOutcome, RolloutSpec, StopReason

# What the learner does with an advantage, and which prompts are sampled: a replay has neither a loss nor a sampler,
# and would show no difference.
ELSEWHERE = {
    "the learner's": (
        "weight", "final_weight", "anneal_steps", "loss", "clip", "dual_clip", "correction", "correction_range",
    ),
    "the sampling's": ("max_num_gen_batches",),
}  # fmt: skip
_LEFT_OUT = "reward/left_out_"


@dataclass(frozen=True)
class RecordedStep:
    """A step as its driver had it before the algorithm was asked, and what the algorithm made of it then."""

    step: int
    ended: EndedStep  # but for its `probe_rewards`, which the steps before it give
    written: dict[int, RolloutCredit]
    learner_logprobs: dict[int, FloatArray]  # of a rollout's first tokens, by its id, where they are recorded


class Difference(NamedTuple):
    """A value in a trace that is not what the run's own objective gives."""

    step: int
    rollout_id: int
    column: str
    written: float | None
    computed: float | None


@dataclass(frozen=True)
class Worth:
    """What one setting of the objective makes of a run's rewards. Means are over its steps."""

    changes: Mapping[str, Any]  # values that were asked for
    abs_mean: float | None  # size of the advantages
    zero_share: float | None  # tokens of the policy's loss whose advantage is 0
    constant_share: float | None  # groups whose rewards are all the same
    left_out: Mapping[str, int]  # rollouts that count nothing, in all, by the reason
    correlation: float | None  # of advantage times weight with the run's own, over all rollouts; None if constant


def recorded_steps(run_dir: Path, config: Config) -> tuple[list[RecordedStep], list[str]]:
    """The whole steps of a run in their order, and a note for what is missing.

    UserError for a run that did not learn from rewards, or whose traces say nothing of them.
    """
    if not config.objective.rl.weight:
        raise UserError(
            f"{run_dir}: objective.rl.weight = 0: the run did not learn from rewards, and has no advantages to "
            "replay; without --objective its termination rule is replayed"
        )
    table, notes = load_table(run_dir)
    if table.column("reward_weight").null_count == len(table):
        raise UserError(
            f"{run_dir}: its traces have no columns reward_weight and advantage: an older version wrote them, "
            "which recorded no rewards; the run has to be made again"
        )
    steps, incomplete = [], []
    numbers, first, counts = np.unique(table.column("step").to_numpy(), return_index=True, return_counts=True)
    first_ids = dict(zip(numbers.tolist(), table.column("rollout_id").to_numpy()[first].tolist(), strict=True))
    for step, start, count in zip(numbers.tolist(), first.tolist(), counts.tolist(), strict=True):
        part = table.slice(start, count)
        left = config.rollout.prompts_per_step - len(given_places(config, step))
        whole = _is_whole(part.column("rollout_id").to_numpy(), first_ids.get(step + 1), config, left)
        if whole and not any(part.column(name).null_count for name in ("reward_weight", "probe_share")):
            steps.append(_recorded_step(step, part, config.rollout.max_tokens))
        else:
            incomplete.append(step)
    if incomplete:
        shown = ", ".join(map(str, incomplete[:5])) + ", ..." * (len(incomplete) > 5)
        notes = (*notes, f"left out {len(incomplete)} steps whose rewards are not all there: {shown}")
    if not steps:
        raise UserError(f"{run_dir}: none of its steps is whole: its groups cannot be put together")
    return steps, list(notes)


def _is_whole(ids: np.ndarray, following: int | None, config: Config, prompts: int) -> bool:
    """Whether these are all rollouts of a step with so many `prompts` whose completions are not given; `following`
    is the first of the next step, where that is there.
    """
    rollout, batches = config.rollout, config.objective.rl.max_num_gen_batches
    if batches == 1:
        return len(ids) == prompts * rollout.rollouts_per_prompt
    ends = following is None or following - ids[-1] == 1
    groups, rest = divmod(len(ids), rollout.rollouts_per_prompt)
    in_a_row = int(ids[-1]) - int(ids[0]) + 1 == len(ids) and ids[0] % rollout.rollouts_per_prompt == 0
    most = batches * rollout.prompts_per_step
    return bool(ends and in_a_row and not rest and rollout.prompts_per_step <= groups <= most)


def _recorded_step(step: int, table: pa.Table, longest: int) -> RecordedStep:
    rows = table.select([f.name for f in table.schema if not pa.types.is_list(f.type)]).to_pylist()
    names = ("token_ids", "sampled_logprobs", "learner_logprobs")
    tokens, logprobs, learner = (_values(table, name) for name in names)
    ended = EndedStep(
        rollouts=[_finished(*parts) for parts in zip(rows, tokens, logprobs, strict=True)],
        specs=[RolloutSpec(r["rollout_id"], r["prompt_id"], (), 0, r["probe"], longest) for r in rows],
        rewards={
            r["rollout_id"]: Reward(r["reward"], dict(r["rewards"] or ()), r["reward_error"] or "")
            for r in rows
            if r["reward"] is not None or r["reward_error"] is not None
        },
        probe_share=rows[0]["probe_share"],
    )
    written = {r["rollout_id"]: RolloutCredit(*(r[name] for name in RolloutCredit._fields)) for r in rows}
    by_learner = {r["rollout_id"]: own for r, own in zip(rows, learner, strict=True) if own is not None}
    return RecordedStep(step, ended, written, by_learner)


def _values(table: pa.Table, name: str) -> list[np.ndarray | None]:
    """A column of lists, row by row; None where it is null."""
    lists = table.column(name).combine_chunks()
    lengths = np.asarray(lists.value_lengths().fill_null(0))
    parts = np.split(np.asarray(lists.flatten()), np.cumsum(lengths)[:-1])
    known = lists.is_valid().to_pylist()
    return [part if there else None for part, there in zip(parts, known, strict=True)]


def _finished(row: Mapping[str, Any], tokens: np.ndarray | None, logprobs: np.ndarray | None) -> FinishedRollout:
    """As the driver had it, but for the weights of the KL, which advantages do not depend on."""
    assert tokens is not None  # `read_rows` has checked
    outcome = RolloutOutcome(
        rollout_id=row["rollout_id"],
        stop_reason=StopReason(row["stop_reason"]),
        scored=len(tokens),  # of a rollout that is not cut; of others it is not asked for
        **{name: row[name] for name in ("cut", "confirmed", "threshold", "minimum", "probe", "would_cut")},
    )
    return FinishedRollout(outcome, tokens, count_tokens(outcome, len(tokens)), logprobs)


def replayed(steps: Sequence[RecordedStep], config: Config) -> list[Credit]:
    """What the configuration's algorithm makes of each step; `steps` are those of a run that are whole, in order.

    After one that is missing nothing is known of earlier probes.
    """
    algorithm = algorithm_of(config)
    credits: list[Credit] = []
    following = 0
    for step in steps:
        earlier = credits[-1].probe_rewards if credits and step.step == following else ()
        credits.append(algorithm.credit(replace(step.ended, probe_rewards=earlier)))
        following = step.step + 1
    return credits


def without_history(steps: Sequence[RecordedStep], credits: Sequence[Credit], config: Config) -> dict[int, int]:
    """Steps that cannot be held against the traces, each with the missing step that it depends on.

    With `probe_mean` the reward of a cut rollout is that of the probes before it. All of them are known again once
    the steps since have filled the buffer.
    """
    rule = config.objective.rl
    found: dict[int, int] = {}
    missing, following, known = None, 0, 0
    for step, credit in zip(steps, credits, strict=True):
        if step.step != following:
            missing, known = following, 0
        if missing is not None and known < rule.probe_buffer and rule.cut_reward == "probe_mean":
            found[step.step] = missing
        following, known = step.step + 1, len(credit.probe_rewards)
    return found


def differences(
    steps: Sequence[RecordedStep], credits: Sequence[Credit], leave_out: Collection[int] = ()
) -> list[Difference]:
    """Where the traces hold other bits than were computed; in the order of steps and rollouts."""
    found = []
    for step, credit in zip(steps, credits, strict=True):
        if step.step in leave_out:
            continue
        own = credit.by_rollout()
        for rollout_id, written in step.written.items():
            for column, was, computed in zip(RolloutCredit._fields, written, own[rollout_id], strict=True):
                if _bits(was) != _bits(computed):
                    found.append(Difference(step.step, rollout_id, column, was, computed))
    return found


def _bits(value: float | None) -> bytes | None:
    return None if value is None else struct.pack("<d", value)


def with_objective(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with other values in `objective.rl`; UserError says which a run would not be allowed."""
    rl = with_changes(config.objective.rl, changes, "objective.rl")
    changed = config.model_copy(update={"objective": config.objective.model_copy(update={"rl": rl})})
    try:
        changed = Config.model_validate(changed.model_dump())
    except ValidationError as error:
        raise section_error(error, (), {}) from None
    check_rule(changed)
    return changed


def worth(changes: Mapping[str, Any], credits: Sequence[Credit], own: Sequence[Credit]) -> Worth:
    """The figures of one setting beside those of the run's own."""
    left_out: dict[str, int] = {}
    for credit in credits:
        for name, count in credit.metrics.items():
            if name.startswith(_LEFT_OUT):
                reason = name.removeprefix(_LEFT_OUT).replace("_", " ")
                left_out[reason] = left_out.get(reason, 0) + int(count)
    return Worth(
        changes=changes,
        abs_mean=_mean(credits, "advantage/abs_mean"),
        zero_share=_mean(credits, "advantage/zero_share"),
        constant_share=_mean(credits, "group/constant_share"),
        left_out=left_out,
        correlation=_correlation(_signals(credits), _signals(own)),
    )


def _mean(credits: Sequence[Credit], metric: str) -> float | None:
    values = [credit.metrics[metric] for credit in credits if metric in credit.metrics]
    return sum(values) / len(values) if values else None


def _signals(credits: Sequence[Credit]) -> FloatArray:
    """Advantage times weight of every rollout, 0 of those that count nothing."""
    values = [c.reward_weight * (c.advantage or 0.0) for credit in credits for c in credit.by_rollout().values()]
    return np.array(values, dtype=np.float64)


def _correlation(first: FloatArray, second: FloatArray) -> float | None:
    if not (np.ptp(first) > 0 and np.ptp(second) > 0):
        return None
    return float(np.corrcoef(first, second)[0, 1])
