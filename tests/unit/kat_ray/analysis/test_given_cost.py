"""What completions of the data cost: passes of the learner, and of a teacher that is asked, and no sampling."""

from pathlib import Path

import pytest

from kat_ray.analysis.compare_results import tflop_parts
from tests.support.configs import make_config

SUMMARY = {
    "parameters": {"student": 10**9, "teacher": 4 * 10**9}, "prompt_tokens": 100, "generated_tokens": 1000,
    "kept_tokens": 800, "learnt_tokens": 800, "scored_tokens": 900,
}  # fmt: skip
GIVEN = {"given_tokens": 50, "given_prompt_tokens": 10, "given_scored_tokens": 60}


def parts(**more):
    return tflop_parts(SUMMARY | more, Path("summary.json"), make_config("student", "teacher"))


def test_completions_are_learnt_and_scored_and_not_generated():
    plain, found = parts(), parts(**GIVEN)
    assert found["tflop_sampling"] == plain["tflop_sampling"]
    assert found["tflop_learning"] - plain["tflop_learning"] == pytest.approx(6e-3 * 60)
    assert found["tflop_scoring"] - plain["tflop_scoring"] == pytest.approx(8e-3 * 60)


def test_of_several_teachers_they_are_in_what_each_was_given():
    told = {"parameters": {"student": 10**9, "teachers.a": 10**9}, "teacher_tokens": {"teachers.a": 1060}}
    assert parts(**GIVEN, **told)["tflop_scoring"] == pytest.approx(2e-3 * 1060)
