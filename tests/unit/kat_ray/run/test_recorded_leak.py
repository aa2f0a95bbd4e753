"""The guard `context_leak`, fed what runs of `demo-hints` were recorded to do (docs/results.md)."""

import re

import numpy as np
import pytest

from kat_ray.config.load import load_config
from kat_ray.rewards.verifiers import EvalResult
from kat_ray.run.step_guards import StepGuards
from tests.support.paths import ROOT
from tests.support.step_results import a_step

PROBLEMS, K = 200, 3
FIRST_KL = 0.081
KINDS = {"given": (2, 3), "average": (4, 5), "live": (6, 7)}  # columns of the table: avg@3, KL of the step


def recorded(kind):
    """By the step of the evaluation: (avg@3, KL of that step)."""
    page = (ROOT / "docs/results.md").read_text().split("## Taught by itself, told the solution")[1]
    rows = [[c.strip() for c in line.split("|")] for line in re.findall(r"^\| \d.*$", page, re.M)]
    right, kl = KINDS[kind]
    return {int(r[1]): (float(r[right].rstrip("%")) / 100, float(r[kl] or FIRST_KL)) for r in rows}


def kl_of_steps(found):
    """The KL of each step, 1 to the last: what was recorded, and on a straight line of logarithms between."""
    steps = [1, *sorted(found)[1:]]
    return np.exp(np.interp(range(1, steps[-1] + 1), steps, np.log([found[n if n > 1 else 0][1] for n in steps])))


def evaluation(accuracy, turned):
    """Problems that are all right or all wrong; `turned`, those at the other end are right.

    As wide a spread of falls as the means allow: those of single problems are not on the page.
    """
    right = round(accuracy * PROBLEMS)
    shares = (K,) * right + (0,) * (PROBLEMS - right)
    return EvalResult(accuracy, accuracy, K, PROBLEMS, 40.0, 0.0, shares[::-1] if turned else shares)


@pytest.mark.parametrize(("kind", "expected"), [("live", [20]), ("given", []), ("average", [])])
def test_it_fires_at_the_recorded_fall_and_at_nothing_else(kind, expected, tmp_path):
    """Each evaluation is judged with the step that follows it, the last one by itself."""
    found, said, fired = recorded(kind), [], []
    assert list(found) == [0, 10, 20, 30, 40]
    guards = StepGuards(load_config("demo-hints", [f"teacher.weights={kind}"]), tmp_path, said.append)

    def judged(evaluated, judge, *arguments):
        said.clear()
        judge(*arguments)
        fired.extend(evaluated for line in said if "context_leak" in line)

    for step, kl in enumerate(kl_of_steps(found)):
        if step in found:
            guards.evaluated(evaluation(found[step][0], turned=step % 20))
        judged(step, guards.check, a_step(done=step + 1, staleness=0, recorded={"kl/mean": float(kl)}))
    guards.evaluated(evaluation(found[40][0], turned=False))
    judged(40, guards.last_evaluation, 40)
    assert fired == expected
