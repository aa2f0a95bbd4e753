"""Settings of a rule that will do nothing in their run are said before it starts."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from kat_ray.config.load import load_config
from kat_ray.errors import UserError
from kat_ray.termination import RULES, RunScale
from tests.support.rules import settings_from


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rule": "fixed_prefix", "n": 50}, ["n = 50 >= rollout.max_tokens = 50: nothing will be cut"]),
        ({"rule": "fixed_prefix", "n": 49}, []),
        ({"rule": "progressive", "start": 60}, ["the horizon falls", "the first steps have no horizon"]),
        ({"rule": "progressive", "start": 60, "end": 70}, ["the first steps have no horizon"]),
        ({"rule": "progressive", "start": 30, "end": 20}, ["start = 30 > end = 20: the horizon falls"]),
        ({"rule": "progressive", "start": 49}, []),
        ({"rule": "prune_opd", "start": 51}, ["start = 51 > rollout.max_tokens = 50"]),
        ({"rule": "repetition", "min_period": 13, "repeats": 4}, ["no loop is ever complete"]),
        ({"rule": "repetition"}, []),
        ({"rule": "random", "longest": 99}, []),
        ({"rule": "none"}, []),
        # 0.1 x 8 probes a step: 80 in 100 steps.
        ({"rule": "kat", "window": 8, "exempt": 8, "min_samples": 8, "min_steps": 1, "buffer": 80, "eta": 0.3}, []),
        (
            {"rule": "kat", "window": 8, "exempt": 8, "min_samples": 8, "min_steps": 1, "buffer": 80},
            ["buffer = 80 holds the probes of 100 steps (0.8 a step)"],
        ),
        ({"rule": "kat", "window": 8, "exempt": 8, "probe_share": 1}, []),
        (
            {"rule": "kat_stages", "window": 8, "exempt": 8, "min_samples": 8, "min_steps": 1, "buffer": 160},
            ["buffer = 160 holds the probes of 200 steps (0.8 a step)"],
        ),
        (
            {"rule": "kat", "window": 8, "exempt": 8, "min_samples": 8, "min_steps": 1, "buffer": 160,
             "calibrate_on": "all"}, [],
        ),
        ({"rule": "kat", "window": 60, "exempt": 0, "eta": 0.3, "buffer": 64, "min_samples": 64, "min_steps": 20},
         ["after 63 tokens at the earliest", "no window is ever full", "before the rule becomes active"]),
    ],
)  # fmt: skip
def test_settings_that_do_nothing_are_named(fields, words):
    run = RunScale(steps=20, max_tokens=50, rollouts_per_step=8)
    warnings = list(RULES[fields["rule"]].warnings(settings_from(**fields), run))
    assert len(warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, warnings, strict=True))


def test_training_says_what_its_rule_will_not_do(tmp_path, monkeypatch, capsys):
    from actors.driver import train as run

    @contextmanager
    def stop(config, run, progress):
        raise UserError("as far as this test goes")
        yield

    prompts = SimpleNamespace(skipped_too_long=0, repeated=0, prompts=range(48), longest=9)
    unknown = SimpleNamespace(parameters=None)
    facts = SimpleNamespace(warnings=[], student=unknown, teachers={"teacher": unknown})
    golds = SimpleNamespace(note=None)
    prepared = SimpleNamespace(facts=facts, train=prompts, heldout=None, golds=golds)
    monkeypatch.setattr(run, "prepare", lambda config: prepared)
    monkeypatch.setattr(run, "_placement", stop)
    overrides = [f"run.dir={tmp_path}", "termination.rule=fixed_prefix", "termination.n=208"]
    with pytest.raises(UserError, match="as far as"):
        run.train(load_config("demo", overrides))
    assert "termination: n = 208 >= rollout.max_tokens = 208: nothing will be cut" in capsys.readouterr().out
