"""The pictures of a run that learns from rewards: what is drawn is what was recorded."""

import json

import numpy as np
import pytest

from kat_ray.cli import main as cli
from kat_ray.report import curves, rewards
from kat_ray.report.run_records import read_run
from kat_ray.report.sources import by_source, source_sections, sources
from tests.support.reports import row, small_run, write_run


@pytest.fixture
def run(tmp_path):
    """Two steps: of eight groups one and two are all right, four and one all wrong."""
    path = small_run(tmp_path)
    line = {
        "rl/ratio_mean": 1.0, "rl/ratio_max": 1.25, "rl/clip_low_share": 0.0, "rl/clip_high_share": 0.0625,
        "rl/effective_share": 0.875, "rl/length_right": 20.0, "rl/length_wrong": 30.0, "rl/cut_share": 0.25,
        "rl/truncated_share": 0.125, "advantage/zero_share": 0.5, "rollout/eos_share": 1.0,
    }  # fmt: skip
    steps = [
        line | {"step": 1, "reward/mean": 0.25, "group/std": 0.5, "group/constant_share": 5 / 8,
                "group/all_wrong_share": 4 / 8, "reward/part/score": 0.2, "reward/part/format": 0.75},
        line | {"step": 2, "reward/mean": 0.75, "group/std": 0.25, "group/constant_share": 3 / 8,
                "group/all_wrong_share": 1 / 8, "reward/part/score": 0.7, "reward/part/format": 1.0},
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return path


def lines_of(axes):
    """By label what a strong line shows."""
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_alpha() is None}


def test_rewards_are_drawn_with_their_spread_and_parts(run):
    reward, groups, lengths, tokens = rewards.rewards(read_run(run)).axes
    assert lines_of(reward) == {"mean": [0.25, 0.75], "format": [0.75, 1.0], "score": [0.2, 0.7]}
    (band,) = reward.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert {(1, -0.25), (1, 0.75), (2, 0.5), (2, 1.0)} <= corners
    assert [t.get_text() for t in groups.get_legend().get_texts()] == ["all right", "mixed", "all wrong"]
    assert lines_of(lengths) == {"right": [20, 20], "wrong": [30, 30]}
    assert lines_of(tokens)["of cut rollouts"] == [0.25, 0.25] and len(lines_of(tokens)) == 3


def test_shares_of_groups_by_hand(run):
    steps, shares = rewards.group_shares(read_run(run))
    assert steps == [1, 2]
    assert shares == {"all right": [1 / 8, 2 / 8], "mixed": [3 / 8, 5 / 8], "all wrong": [4 / 8, 1 / 8]}


def test_the_ratio_is_drawn_by_its_distance_from_1(run):
    ratio, held = rewards.ratios(read_run(run)).axes
    assert lines_of(ratio) == {"largest": [0.25, 0.25], "mean": [1e-9, 1e-9]}, "a logarithmic axis has no 0"
    assert lines_of(held) == {
        "held from above": [0.0625, 0.0625], "held from below": [0, 0], "taken away by the ratio": [0.125, 0.125]
    }  # fmt: skip


def test_entropy_and_weights_are_drawn_where_a_run_has_them(run):
    assert [s.name for s in rewards.reward_sections(read_run(run))] == ["rewards", "ratios"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [m | {"rl/entropy": 0.5 / m["step"]} for m in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    assert [s.name for s in rewards.reward_sections(read_run(run))] == ["rewards", "ratios", "entropy"]
    lines = [m | {"objective/rl_weight": 1.0, "objective/opd_weight": 1 / m["step"]} for m in lines]
    lines = [m | {"rl/grad_share": 0.25 * m["step"]} for m in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    records = read_run(run)
    assert rewards.reward_sections(records)[-1].png
    axes = curves.figure(1, 1)[1][0][0]
    rewards._weights(axes, records)
    assert lines_of(axes) == {"rewards": [1, 1], "teacher": [1, 0.5]}
    axes = curves.figure(1, 1)[1][0][0]
    rewards._gradient(axes, records)
    assert [list(values) for values in lines_of(axes).values()] == [[0.25, 0.5]]


@pytest.mark.integration
def test_the_page_has_them_where_there_were_rewards_and_only_there(run, tmp_path, capsys):
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report" / "report.html").read_text()
    assert 'id="rewards"' in page and 'id="ratios"' in page and "0.25 → 0.75" in page
    assert (run / "report" / "rewards.png").stat().st_size > 10_000
    without = small_run(tmp_path / "without")
    assert cli.main(["report", str(without)]) == 0
    assert 'id="rewards"' not in (without / "report" / "report.html").read_text()
    assert not (without / "report" / "rewards.png").exists()


def test_a_page_of_a_run_that_asked_no_teacher_has_no_empty_pictures(tmp_path):
    unscored = dict(token_ids=np.arange(2, 11, dtype=np.int32), probe=False, threshold=None, features=None)
    rows = [row(i, [], minimum=None, **unscored) for i in range(4)]
    path = write_run(tmp_path / "run", [rows], ["termination.rule=none"])
    assert cli.main(["report", str(path)]) == 0
    pictures = {file.stem for file in (path / "report").glob("*.png")}
    assert {"learning", "stops"} <= pictures and not pictures & {"threshold", "health", "heatmap", "position"}


def test_a_run_without_a_ratio_or_without_spread_has_its_rewards(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k in ("step", "reward/mean")} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (section,) = rewards.reward_sections(read_run(run))
    assert section.name == "rewards" and section.png


def test_sources_are_drawn_those_with_the_most_rollouts_first(run):
    assert source_sections(read_run(run)) == []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, share in zip(lines, (0.25, 0.5), strict=True):
        line |= {"source/rollouts/gcd": 4, "source/rollouts/openai/gsm8k": 12, "source/mean_length/gcd": 3.0}
        line |= {"source/pass_rate/gcd": share, "source/pass_rate/openai/gsm8k": 1.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = read_run(run)
    assert sources(records) == ["openai/gsm8k", "gcd"]
    passed, lengths = by_source(records).axes
    assert lines_of(passed) == {"openai/gsm8k": [1.0, 1.0], "gcd": [0.25, 0.5]}
    assert lines_of(lengths) == {"gcd": [3.0, 3.0]}
    (section,) = source_sections(records)
    assert section.png and "Drawn are" not in section.text
