"""Several runs on one page, while they go on; and a page of a run that is being written."""

import json
import re
import shutil

import pytest

from kat_ray.cli import main as cli
from kat_ray.config.load import load_config
from kat_ray.report import side_by_side
from kat_ray.report.cut_figure import _lines, _parts, example
from kat_ray.report.run_records import read_run
from tests.support.reports import small_run


@pytest.fixture
def runs(tmp_path):
    """Two runs, which differ in a setting and in how far they have come."""
    one = small_run(tmp_path)
    other = tmp_path / "other" / "run"
    shutil.copytree(one, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(r"\n  lr: .*", "\n  lr: 0.125", text))
    (one / "summary.json").write_text('{"steps": 1, "wall_seconds": 321.4}')
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "kl/mean": 0.125, "rollout/generated_tokens": 50.0}\n{"step": 3, "kl/me')
    return one, other


def cells(html):
    """{first cell: the others} of all tables."""
    rows = (re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html, re.S))
    return {first: others for first, *others in filter(None, rows)}


def test_runs_that_go_on_are_side_by_side(runs, capsys):
    one, other = runs
    assert cli.main(["report", str(one), str(other)]) == 0
    page = one / "report" / "side-by-side.html"
    html = page.read_text()
    assert str(page) in capsys.readouterr().out
    table = cells(html)
    assert table[""] == ["reports_are_side/run", "other/run"] or table[""][1] == "other/run"
    assert table["steps"] == ["1 of 1", "2 of 1"] and table["tokens generated"] == ["30", "80"]
    assert table["KL, nats"] == ["0.5000", "0.1250"] and table["wall time, s"] == ["321", "-"]
    assert table["of them kept"] == ["66.7%", "25.0%"] and table["accuracy, first and last"][0] == "10.0% → 10.0%"
    assert table["learner.lr"][1] == "0.125" and "run.seed" not in table, "only what differs"
    assert "metrics.jsonl:4 is half a line: the run is writing it" in html
    assert 'id="kl-mean"' in html and 'id="reward-mean"' not in html
    assert (one / "report" / "kl-mean.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_differ_in_their_seed_only_look_alike(runs, tmp_path):
    one, other = runs
    again = tmp_path / "again" / "run"
    shutil.copytree(one, again)
    (again / "config.yaml").write_text(re.sub(r"seed: \d+", "seed: 77", (one / "config.yaml").read_text()))
    read = [side_by_side._Run(f.parent.name, load_config(f / "config.yaml"), [], None) for f in (one, other, again)]
    assert side_by_side._looks(read) == [
        ("C0", f"{one.parent.name} and 1 more"), ("C1", "other"), ("C0", None)
    ]  # fmt: skip


def test_costs_are_summed_up_to_the_step_of_a_value():
    lines = [{"step": 0, "eval/avg_at_k": 0.1}, {"step": 1, "time/step": 2.0}, {"step": 2, "time/step": 3.5}]
    run = side_by_side._Run("a", None, lines, None)
    assert side_by_side._cost_at(run, "time/step", [0, 1, 2, 9]) == [0.0, 2.0, 5.5, 5.5]


def test_a_run_may_have_an_equals_sign_in_its_name(runs, capsys):
    """As those that `compare` makes of a rule with settings have: kat-eta=0.5."""
    one, other = runs
    renamed = other.rename(other.with_name("kat-eta=0.5"))
    assert cli.main(["report", str(one), str(renamed)]) == 0
    assert str(one / "report" / "side-by-side.html") in capsys.readouterr().out


def test_mistakes_are_one_message(runs, capsys, tmp_path):
    one, other = map(str, runs)
    for arguments, message in (
        ([one, one], "is named twice"),
        ([one, other, "window=4"], "window=4: is for the report of one run"),
        ([one, other, "--gradients"], "--gradients: is for the report of one run"),
        ([one, str(tmp_path)], f"{tmp_path}: no config.yaml in it"),
        ([one, "nobody"], "nobody: no such run directory, and no setting, which is FIELD=VALUE"),
        ([one, other, "nobody"], "nobody: no such run directory"),
        ([one, "nobody=4"], "'nobody=4': must be FIELD=VALUE"),
    ):
        assert cli.main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_run_that_is_being_written_has_a_page(tmp_path, capsys):
    """Half a line, traces that are not whole yet, no summary; the next page has what came meanwhile."""
    run = small_run(tmp_path)
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines + '{"step": 2, "kl/')
    trace = next((run / "traces").glob("*.parquet"))
    (run / "traces" / "step-000001.partial").write_bytes(trace.read_bytes()[:100])
    (run / "evaluations.jsonl").write_text('{"k": 3, "avg_at_k": 0.25, "pass_at_k": 0.5}\n{"k"')
    assert cli.main(["report", str(run)]) == 0
    html = (run / "report" / "report.html").read_text()
    assert "metrics.jsonl:3 is half a line" in html and "evaluations.jsonl:2 is half a line" in html
    assert "1 steps, 4 rollouts" in html and "is damaged" not in html
    (run / "metrics.jsonl").write_text(lines + json.dumps({"step": 2, "learner/loss": 0.5}) + "\n")
    assert cli.main(["report", str(run)]) == 0
    html = (run / "report" / "report.html").read_text()
    assert "2 steps, 4 rollouts" in html and "metrics.jsonl" not in html.split("<h2")[0]


def test_a_cut_is_drawn_where_the_rule_made_one(tmp_path):
    run = small_run(tmp_path)
    records = read_run(run)
    assert example(records) is None, "its window is 4, and the cut at 3 has none before it"
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("window: 4", "window: 2"))
    assert cli.main(["report", str(run)]) == 0
    assert example(read_run(run)) == 2, "the rollout that was cut"
    assert 'id="cut"' in (run / "report" / "report.html").read_text()
    assert (run / "report" / "cut.png").read_bytes().startswith(b"\x89PNG")


def test_text_that_repeats_itself_stands_there_once():
    assert list(_lines("a\nb\nb\nb\n\n" + "c " * 30)) == ["a", "b  (x 3)", "c " * 16 + "c", "c " * 12 + "c"]
    kept = "\n".join(map(str, range(20)))
    shown = [line for line, _ in _parts(kept, "x\nx")]
    assert shown == ["kept", *map(str, range(6)), "...", "19", "", "cut away", "x  (x 2)", ""]
