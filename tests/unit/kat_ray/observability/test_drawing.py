"""Bars and courses of a terminal, in the columns there are."""

import pytest
from rich.text import Text

from kat_ray.observability.drawing import Figure, course, cut_to, duration, progress_bar, row


def test_a_course_is_scaled_to_its_values():
    assert course([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert course([0, 0, 7, 7], 2) == "▁█" and course([3.0, 3.0], 9) == "▁▁" and course([], 9) == ""
    assert course([0.0, float("nan"), 7.0], 3) == "▁ █"


def test_a_duration_has_hours_from_one_on():
    assert [duration(s) for s in (-5, 3599.9, 3600, 3723.9, 36_000 * 10)] == [
        "0:00", "59:59", "1:00:00", "1:02:03", "100:00:00",
    ]  # fmt: skip


def test_a_bar_is_as_full_as_the_run():
    assert progress_bar(0, 4, 8).plain == "─" * 8 and progress_bar(1, 4, 8).plain == "━━──────"
    assert progress_bar(9, 4, 8).plain == "━" * 8, "a run that was given fewer steps than it has"
    assert progress_bar(1, 4, 8, unicode=False).plain == "##------"


@pytest.mark.parametrize("width", [200, 80, 60, 46, 30, 12, 1])
@pytest.mark.parametrize("unicode", [True, False])
def test_nothing_is_wider_than_there_are_columns(width, unicode):
    figure = Figure("threshold maths", [1 / n for n in range(1, 300)], "{:.4f}".format)
    lines = [row(figure, width, unicode), progress_bar(1, 2, width, unicode), Text("x" * 300)]
    text = cut_to(lines, width, unicode)
    assert max(map(len, text.plain.splitlines())) <= width
    assert unicode or text.plain.isascii()
