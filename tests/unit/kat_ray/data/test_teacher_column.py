"""Which teacher a prompt names, and what is refused by file and line."""

import json
import math

import pytest

from kat_ray.config import DataConfig
from kat_ray.data.prompt_order import PromptOrder, rollout_specs
from kat_ray.data.prompts import load_prompts
from kat_ray.errors import DataError
from kat_ray.types.records import StepStart
from tests.support.configs import make_config
from tests.support.tokenizers import make_tokenizer

NAMES = ("default", "math", "code")


@pytest.fixture
def load(tmp_path):
    def _load(rows, names=NAMES, longest=None, column="subject"):
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{i}", **row}) + "\n" for i, row in enumerate(rows)))
        data = DataConfig(path=str(path), teacher_column=column)
        return load_prompts(data, make_tokenizer(), longest, teachers=dict.fromkeys(names))

    return _load


def test_a_row_names_its_teacher_and_one_that_names_nobody_has_the_default(load):
    rows = [{"subject": s} for s in ("math", None, math.nan, "code", "default")]
    assert [p.teacher for p in load([*rows, {}]).prompts] == ["math", *["default"] * 2, "code", *["default"] * 2]
    nested = load([{"meta": {"of": "math"}}, {"meta": {"of": "code"}}, {}], column="meta.of")
    assert [p.teacher for p in nested.prompts] == ["math", "code", "default"]
    assert [p.teacher for p in load(rows, ()).prompts] == ["default"] * 5, "where nobody is asked, nobody is given"


@pytest.mark.parametrize(
    ("rows", "names", "said"),
    [
        ([{"subject": "maths"}], NAMES,
         r"jsonl:1: subject = 'maths': no such teacher, there are default, math, code; did you mean math\?$"),
        ([{"subject": "math"}, {}], ("math",),
         r"jsonl:2: there is no column 'subject'; there are prompt \(data.teacher_column chooses\); the section "),
        ([{"subject": None}], ("math",), "jsonl:1: subject is null; the section `teacher` would score the rows"),
        ([{"subject": math.nan}], ("math",), r"jsonl:1: subject is missing \(NaN\); the section `teacher` would"),
        ([{"subject": 3}], NAMES, "jsonl:1: subject is a number; a teacher's name is text"),
        ([{"subject": "math"}, {}], NAMES, "^teachers.code: no row of .*jsonl names it in column 'subject': "),
        ([{"subject": "math"}, {"subject": "code"}], NAMES, "^teacher: no row of .* lacks a teacher in column"),
    ],
)  # fmt: skip
def test_names_that_nobody_has_and_teachers_that_nobody_names_are_refused(load, rows, names, said):
    with pytest.raises(DataError, match=said):
        load(rows, names)


def test_a_teacher_whose_prompts_are_all_too_long_has_none(load):
    rows = [{"prompt": "1", "subject": "math"}, {"prompt": "12345678", "subject": "code"}]
    with pytest.raises(DataError, match=r"teachers.code: .* of those that are not too long \(1 are\): leave"):
        load(rows, ("math", "code"), longest=4)


def test_a_resume_finds_out_that_prompts_are_given_to_others(load):
    plain = [{"subject": "math"}, {"subject": "code"}]
    found, turned = load(plain, ("math", "code")), load(plain[::-1], ("math", "code"))
    assert found.digest != turned.digest
    assert load(plain, ()).digest == load([{}, {}], ()).digest, "the digest of before there were teachers by name"


def test_probes_and_lengths_are_those_of_the_teachers_rule(load):
    prompts = load([{"subject": "math"}, {"subject": "code"}], ("math", "code")).prompts
    config = make_config("a", "b", rollout={"prompts_per_step": 200, "max_tokens": 64},
                         termination={"rule": "kat", "probe_share": 0.5})  # fmt: skip
    start = StepStart(None, None, by_teacher={"math": StepStart(0.1, 20, 0.0), "code": StepStart(None, None, None)})
    specs = rollout_specs(PromptOrder(prompts, 0, False), config, range(200), start)
    math, code = ([s for s in specs if s.teacher == name] for name in ("math", "code"))
    assert len(math) == len(code) == 100
    assert {(s.probe, s.max_tokens) for s in math} == {(False, 20)}
    assert {s.max_tokens for s in code} == {64} and 30 < sum(s.probe for s in code) < 70
    capped = StepStart(None, None, by_teacher={"math": StepStart(0.1, 20), "code": StepStart(None, None)})
    again = rollout_specs(PromptOrder(prompts, 0, False), config, range(200), capped)
    mine = [s for s in again if s.teacher == "math"]
    assert {s.max_tokens for s in mine if s.probe} == {64} and {s.max_tokens for s in mine if not s.probe} == {20}
