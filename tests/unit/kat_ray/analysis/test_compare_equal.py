"""Accuracy at equal generated tokens and equal arithmetic: by hand, and its laws."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest

from kat_ray.analysis.bootstrap import RESAMPLES, band, bootstrap
from kat_ray.analysis.compare import config_of, evaluated_along_the_way, parse_arm, plan_runs
from kat_ray.analysis.compare_curves import COSTS, Curve, curve_of
from kat_ray.analysis.compare_equal import arm_curves, equal_cost, without_curves
from kat_ray.analysis.compare_results import read_finished, read_results, read_runs
from kat_ray.analysis.compare_table import Compared, equal_tables, paired, write_results
from kat_ray.cli import main as cli
from kat_ray.config.load import save_config
from tests.support.comparisons import BASE, changed, finish_rule

ARMS = [parse_arm("none"), parse_arm("kat")]


def line(step, tokens, right, k=2):
    counts = dict.fromkeys(("prompt_tokens", "kept_tokens", "scored_tokens", "trained_tokens"), tokens // 2)
    return {"step": step, "k": k, "right": right, "generated_tokens": tokens, **counts}


def curve(*lines):
    made, trouble = curve_of(lines, lambda of: of["generated_tokens"] / 100)
    assert trouble is None
    return made


def run(made, seed=0):
    return SimpleNamespace(seed=seed, curve=made)


def drawn(rng, tokens, problems=40):
    """A run whose evaluations cost these tokens."""
    steps = enumerate(tokens)
    return curve(*(line(step, cost, rng.integers(0, 3, problems).tolist()) for step, cost in steps))


def test_a_point_between_two_evaluations_by_hand():
    # 100 tokens: first evaluation, of one answer each; a quarter of the way to the second at 300.
    made = curve(line(0, 0, [0, 0]), line(5, 100, [1, 0], k=1), line(10, 300, [1, 2]))
    at = made.at("generated_tokens", np.array([0, 50, 100, 150, 300]))
    assert at.tolist() == [[0, 0], [0.5, 0], [1, 0], [0.875, 0.25], [0.5, 1]]
    assert made.at("tflop", np.array([1.5])).tolist() == [[0.875, 0.25]]
    assert made.at("step", np.array([7.5])).tolist() == [[0.75, 0.5]]
    assert [p["avg_at_k"] for p in made.points] == [0, 0.5, 0.75]


def test_unequal_totals_by_hand():
    # kat ends at 200 tokens, where none is a quarter of the way from [1/2, 0] at 160 to [1, 1/2] at 320.
    kat = curve(line(0, 0, [0, 0]), line(5, 90, [1, 1]), line(10, 200, [2, 2]))
    none = curve(line(0, 0, [0, 0]), line(5, 160, [1, 0]), line(10, 320, [2, 1]))
    equal = equal_cost([(run(kat), run(none))], "generated_tokens")
    assert equal.costs.tolist() == [200] and equal.shares == (1, 0.625) and equal.seeds == (0,)
    assert equal.avg_at_k == (1, (0.625 + 0.125) / 2)
    assert equal.difference.mean == pytest.approx((0.375 + 0.875) / 2)
    assert (equal.difference.low, equal.difference.high) == (0.375, 0.875), "of two problems: one of them twice"
    other_way = equal_cost([(run(none), run(kat))], "tflop")
    assert other_way.costs.tolist() == [2] and other_way.difference.mean == -equal.difference.mean


def test_seeds_have_budgets_of_their_own():
    first = [curve(line(0, 0, [0]), line(1, 50, [1]), line(2, end, [2])) for end in (100, 200)]
    second = [curve(line(0, 0, [0]), line(1, 50, [0]), line(2, end, [2])) for end in (150, 150)]
    pairs = [(run(a, seed), run(b, seed)) for seed, (a, b) in enumerate(zip(first, second, strict=True))]
    equal = equal_cost(pairs, "generated_tokens")
    assert equal.costs.tolist() == [100, 150]
    # Seed 0: 1 and 1/2; seed 1: 1/2 + 1/2 x 100/150 and 1.
    assert equal.avg_at_k == pytest.approx(((1 + 5 / 6) / 2, 0.75))
    pairs.append((run(first[0], 2), run(None, 2)))
    assert equal_cost(pairs, "generated_tokens").seeds == (0, 1), "a run without a curve is left out"
    assert equal_cost(pairs[2:], "generated_tokens") is None
    late = curve(line(3, 500, [0]), line(4, 600, [1]), line(5, 700, [1]))
    assert equal_cost([(run(late), run(first[0]))], "generated_tokens") is None, "they have no cost in common"


@pytest.mark.parametrize("name", COSTS)
def test_laws(name):
    rng = np.random.default_rng(0)
    costs = [([0, 100, 300, 700], [0, 210, 520, 900]), ([0, 90, 350, 650], [0, 300, 500, 610])]
    pairs = [(drawn(rng, a), drawn(rng, b)) for a, b in costs]

    def of(change=lambda c: c):
        return equal_cost([(run(change(a), s), run(change(b), s)) for s, (a, b) in enumerate(pairs)], name)

    same = equal_cost([(run(a, s), run(a, s)) for s, (a, _) in enumerate(pairs)], name)
    assert same.difference == (0, 0, 0) and same.shares == (1, 1)
    plain = of()
    order = rng.permutation(40)
    permuted = of(lambda c: Curve(c.points, c.right[:, order]))
    assert permuted.avg_at_k == pytest.approx(plain.avg_at_k)
    assert permuted.difference == pytest.approx(plain.difference, abs=0.02), "another draw of resamples"
    assert permuted.difference.mean == pytest.approx(plain.difference.mean)
    scaled = of(lambda c: Curve([{**p, name: 8 * p[name]} for p in c.points], c.right))
    assert scaled.difference == plain.difference and (scaled.costs == 8 * plain.costs).all()
    swapped = equal_cost([(run(b, s), run(a, s)) for s, (a, b) in enumerate(pairs)], name)
    mean, low, high = plain.difference
    assert swapped.difference == pytest.approx((-mean, -high, -low))


def test_resamples_are_those_of_whole_rows_and_columns():
    values = np.random.default_rng(1).normal(size=(2, 3, 20))
    rng = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        seeds, problems = rng.integers(3, size=3), rng.integers(20, size=20)
        means.append(values[:, seeds][:, :, problems].mean(axis=(1, 2)))
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    found = band(values)
    assert np.allclose(found.low, low) and np.allclose(found.high, high)
    assert bootstrap(values[1]) == pytest.approx((values[1].mean(), low[1], high[1]))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(0, 0, [0]), line(1, 9, [1])], None),
        ([line(0, 0, [0]), line(0, 0, [1]), line(2, 9, [1])], None),
        ([line(0, 0, [0]), {"step": 1, "k": 2, "right": [1]}, line(2, 9, [1])], "an earlier version wrote it"),
        ([line(0, 0, [0]), line(1, 5, [1, 0]), line(2, 9, [1])], "not of the same problems"),
        ([line(0, 0, [0]), line(1, 5, [3]), line(2, 9, [1])], "not of the same problems"),
        ([line(0, 0, []), line(1, 5, []), line(2, 9, [])], "not of the same problems"),
        ([line(0, 0, [0]), line(1, 9, [1]), line(2, 9, [1])], "tokens do not grow"),
        ([], None),
    ],
)
def test_what_is_no_curve(lines, message):
    made, trouble = curve_of(lines, lambda of: of["generated_tokens"])
    assert made is None and (trouble is None) == (message is None)
    assert message is None or message in trouble


def test_a_step_that_was_evaluated_again_has_the_later_answers():
    made = curve(line(0, 0, [0]), line(1, 5, [0]), line(2, 9, [2]), line(1, 6, [1]))
    assert made.cost("generated_tokens").tolist() == [0, 6, 9] and made.right[:, 0].tolist() == [0, 0.5, 1]


def compared_of(tmp_path, seeds=(0, 1)):
    """none at 400 tokens; kat at 200, answering as well at each step."""
    for seed in seeds:
        finish_rule(tmp_path, "none", seed, [3, 0, 3, 0], along={1: [1, 0, 1, 0], 2: [2, 0, 2, 0]})
        along = {1: [1, 0, 1, 0], 2: [2, 0, 2, 0]}
        finish_rule(tmp_path, "kat", seed, [3, 0, 3, 0], along=along, generated_tokens=200)
    return Compared.of(read_results(ARMS, seeds, tmp_path), [])


def test_a_comparison_at_equal_cost(tmp_path):
    compared = compared_of(tmp_path)
    (pair,) = compared.pairs
    equal = pair.equal["generated_tokens"]
    assert equal.costs.tolist() == [200, 200] and equal.shares == pytest.approx((1, 0.5))
    # none at 200 of 400 tokens: half-way from a third (133) to two thirds (266), on two of four problems.
    assert equal.avg_at_k == pytest.approx((0.5, 0.25), abs=1e-3)
    assert pair.differences["avg_at_k"].mean == 0 < equal.difference.mean
    heading, (row,) = equal_tables(compared.pairs)["generated_tokens"]
    assert row[:6] == ["kat", "none", "0, 1", "200", "100%", "50%"] and len(row) == len(heading)
    assert row[-1].startswith("+24.9% [")
    files = write_results(compared, tmp_path)
    text = files[0].read_text()
    assert "At equal generated tokens:" in text and "At equal TFLOP:" in text and "Not evaluated" not in text
    saved = json.loads(files[2].read_text())
    assert saved["differences"][0]["at_equal"]["generated_tokens"]["costs"] == [200, 200]
    assert len(saved["curves"]["kat"]["points"]) == 8 and saved["not_at_equal_cost"] is None
    points, places = (list(csv.DictReader(file.open())) for file in files[3:])
    assert points[1] | {"tflop": ""} == {
        "rule": "none", "seed": "0", "step": "1", "generated_tokens": "133", "scored_tokens": "130",
        "trained_tokens": "96", "tflop": "", "k": "3", "avg_at_k": str(1 / 6),
    }  # fmt: skip
    kat = [p for p in places if (p["rule"], p["axis"]) == ("kat", "generated_tokens")]
    assert float(kat[-1]["at"]) == 200 and float(kat[-1]["mean"]) == 0.5, "to its own end"
    assert all(float(p["low"]) <= float(p["mean"]) <= float(p["high"]) for p in places)


def test_costs_of_a_curve_are_the_run_s_own(tmp_path):
    compared_of(tmp_path)
    for rule in ("none", "kat"):
        made = read_finished(tmp_path / rule / "seed-0")
        for name in COSTS:
            assert made.curve.cost(name)[-1] == pytest.approx(made.measures[name])


def test_bands_end_with_the_cheapest_run_and_are_at_the_same_places(tmp_path):
    compared_of(tmp_path, seeds=(0,))
    finish_rule(tmp_path, "kat", 1, [3, 3, 3, 3], along={1: [0, 0, 0, 1]}, generated_tokens=300)
    finish_rule(tmp_path, "none", 1, [3, 3, 3, 3], along={1: [0, 0, 0, 1]})
    curves = arm_curves(read_results(ARMS, [0, 1], tmp_path))
    none, kat = (curves[name].costs["generated_tokens"] for name in ("none", "kat"))
    assert none[0] == kat[0] == 0 and (none[-1], kat[-1]) == (400, 200)
    assert set(kat[:-1]) <= set(none)
    # At 200 tokens seed 0 has ended with 1/2; seed 1 is half-way from 1/12 (100) to 1 (300).
    assert curves["kat"].bands["generated_tokens"].mean[-1] == pytest.approx((1 / 2 + 13 / 24) / 2)
    finish_rule(tmp_path, "kat", 1, [3, 3, 3, 3])
    results = read_results(ARMS, [0, 1], tmp_path)
    assert list(arm_curves(results)) == ["none"], "a mean over some of the seeds would be of other runs"
    assert without_curves(results).startswith(
        "Not evaluated along the way, so not known at equal cost: kat (seed 1)."
    )
    (pair,) = paired(results)
    assert pair.equal["tflop"].seeds == (0,) and pair.seeds == (0, 1)


def test_the_page_shows_curves_and_tables(tmp_path, capsys):
    compared_of(tmp_path)
    runs = [str(tmp_path / rule / f"seed-{seed}") for rule in ("none", "kat") for seed in (0, 1)]
    assert cli.main(["compare", "--runs", *runs, "--out", str(tmp_path / "page")]) == 0
    out = capsys.readouterr().out
    assert "at equal generated tokens" in out and "at equal TFLOP" in out and "Not evaluated" not in out
    html = (tmp_path / "page" / "compare.html").read_text()
    for name in ("along", "equal-generated-tokens", "equal-tflop"):
        assert f'id="{name}"' in html
    assert "equal-unknown" not in html and (tmp_path / "page" / "along.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_both_kinds_are_compared(tmp_path, capsys):
    compared_of(tmp_path, seeds=(0,))
    old = finish_rule(tmp_path, "random", 0, [3, 3, 3, 3])
    damaged = tmp_path / "none" / "seed-0" / "evaluations.jsonl"
    first, second, *rest = damaged.read_text().splitlines()
    damaged.write_text("\n".join([first, json.dumps(json.loads(second) | {"right": [1]}), *rest]) + "\n")
    runs = [str(tmp_path / rule / "seed-0") for rule in ("none", "kat")] + [str(old)]
    assert cli.main(["compare", "--runs", *runs, "--out", str(tmp_path / "page")]) == 0
    out = capsys.readouterr().out
    assert out.count(f"note: {damaged}: its lines are not of the same problems") == 1
    assert "equal cost: none (seed 0); random (seed 0)." in out
    html = (tmp_path / "page" / "compare.html").read_text()
    assert 'id="along"' in html and 'id="equal-unknown"' in html and 'id="equal-tflop"' not in html


def test_how_often_a_run_is_looked_at_makes_no_other_run(tmp_path):
    config = evaluated_along_the_way(BASE, None)
    assert (config.evaluation.every, config.evaluation.every_k) == (1, 1), "of 3 steps"
    assert evaluated_along_the_way(changed(BASE, "run", steps=154), None).evaluation.every == 15
    own = changed(BASE, "evaluation", every=7)
    assert evaluated_along_the_way(own, None) is own, "the configuration's own stays"
    assert evaluated_along_the_way(BASE, 0) is BASE
    assert evaluated_along_the_way(own, 0).evaluation.every == 0
    few = evaluated_along_the_way(changed(BASE, "evaluation", every_k=2), 4).evaluation
    assert (few.every, few.every_k) == (4, 2)
    finish_rule(tmp_path, "none", 0, [1])
    assert [r.done for r in plan_runs(config, ARMS, [0], tmp_path)] == [True, False]
    looked_at = config_of(config, ARMS[0], 1, tmp_path)
    (tmp_path / "none" / "seed-1").mkdir()
    finish_rule(tmp_path, "none", 1, [1])
    save_config(looked_at, tmp_path / "none" / "seed-1" / "config.yaml")
    results, notes = read_runs([tmp_path / "none" / f"seed-{seed}" for seed in (0, 1)])
    assert [r.seeds for r in results] == [(0, 1)] and not notes
