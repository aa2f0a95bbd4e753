"""Held-out sets beside the first on a run's page: curves of what was recorded, and a table with intervals."""

import json
import re

from kat_ray.analysis.intervals import wilson
from kat_ray.cli import main as cli
from kat_ray.report import held_out
from kat_ray.report.held_out import by_set, held_out_sections
from kat_ray.report.run_records import read_run
from tests.support.reports import small_run


def result(right, k, **changes):
    share = sum(right) / (k * len(right))
    return {
        "avg_at_k": share, "pass_at_k": sum(map(bool, right)) / len(right), "k": k, "problems": len(right),
        "mean_length": 12.4, "truncated_share": 0.25, "right": right,
    } | changes  # fmt: skip


def run_with_sets(tmp_path):
    """`math` is evaluated from step 5 on, as after a resume with another set; `once` at the start alone."""
    path = small_run(tmp_path)
    lines = [
        result([0, 1], 2, step=0, sets={"greedy": result([0, 1], 1), "once": result([1, 1], 1)}),
        result([1, 1], 2, step=5, sets={"greedy": result([1, 1], 1), "math": result([0, 2, 4, 4], 4)}),
        result([2, 2], 2, step=9, sets={"greedy": result([1, 1], 1), "math": result([4, 4, 4, 4], 4)}),
    ]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_each_set_is_drawn_and_has_its_first_and_newest_evaluation(tmp_path, monkeypatch):
    records = read_run(run_with_sets(tmp_path))
    found = by_set(records)
    assert {name: [step for step, _ in points] for name, points in found.items()} == {
        "first set": [0, 5, 9], "greedy": [0, 5, 9], "once": [0], "math": [5, 9],
    }  # fmt: skip
    (axes,) = held_out._curves(found).axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn["first set"] == ([0, 5, 9], [0.25, 0.5, 1.0]) and drawn["math"] == ([5, 9], [0.625, 1.0])
    assert drawn["once"] == ([0], [1.0])
    (section,) = held_out_sections(records)
    head, *rows = section.table
    assert [row[:5] for row in rows] == [
        ("first set", "2", "0", "2", "25.0%"), ("first set", "2", "9", "2", "100.0%"),
        ("greedy", "2", "0", "1", "50.0%"), ("greedy", "2", "9", "1", "100.0%"), ("once", "2", "0", "1", "100.0%"),
        ("math", "4", "5", "4", "62.5%"), ("math", "4", "9", "4", "100.0%"),
    ]  # fmt: skip
    low, high = wilson(1.0, 4)
    assert rows[-1][5:] == (f"{low:.1%} to {high:.1%}", "100.0%", "12", "25.0%") and len(head) == len(rows[0])


def test_the_page_shows_them_where_there_are_any(tmp_path, capsys):
    path = run_with_sets(tmp_path)
    assert cli.main(["report", str(path)]) == 0
    page = (path / "report/report.html").read_text()
    assert re.search(r'<h2 id="held-out">Held-out sets</h2>', page) and "<td>greedy</td>" in page
    assert (path / "report/held-out.png").is_file()
    alone = [{k: v for k, v in line.items() if k != "sets"} for line in read_run(path).evaluations]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in alone))
    assert held_out_sections(read_run(path)) == [], "one set is in the learning curves"


def test_more_sets_than_colours_are_told_apart(tmp_path):
    path = small_run(tmp_path)
    sets = {f"s{i}": result([1, 0], 1) for i in range(9)}
    (path / "evaluations.jsonl").write_text(json.dumps(result([1, 0], 1, step=1, sets=sets)) + "\n")
    (axes,) = held_out._curves(by_set(read_run(path))).axes
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 10
