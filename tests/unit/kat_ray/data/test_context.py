"""What a teacher is told in place of the prompt: which text, which tokens, and what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from kat_ray.config import DataConfig, TeacherConfig
from kat_ray.config.load import load_config
from kat_ray.data.batch import collect_samples
from kat_ray.data.chunks import PendingRollout, build_chunk
from kat_ray.data.prompt_order import PromptOrder, rollout_specs
from kat_ray.data.prompts import load_prompts
from kat_ray.errors import DataError
from kat_ray.types.records import EngineEnd, KeptRollout, TeacherRows
from tests.support.configs import make_config
from tests.support.paths import ROOT
from tests.support.tokenizers import TEMPLATE, make_tokenizer

PLAIN = make_tokenizer()
CHAT = make_tokenizer(chat_template=TEMPLATE)


@pytest.fixture
def load(tmp_path):
    def _load(rows, context, tokenizer=PLAIN, longest=None, **fields):
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(path=str(path), **fields)
        return load_prompts(data, tokenizer, longest, teachers={"default": context})

    return _load


def told(prompt, tokenizer=PLAIN):
    return tokenizer.decode(prompt.context_ids)


def test_columns_stand_in_the_text(load):
    rows = [{"prompt": "1+1", "solution": {"steps": "two"}, "n": 3}]
    (found,) = load(rows, "{n}{{{solution.steps}}}{prompt}=").prompts
    assert told(found) == "3{two}1+1=" and PLAIN.decode(found.token_ids) == "1+1"
    (same,) = load(rows, None).prompts
    assert same.context_ids is None


def test_the_prompt_is_the_students_with_its_instruction(load):
    """As text, and as a message; a list of messages has its own."""
    rows = [{"prompt": "1+1", "solution": "2"}, {"prompt": [{"role": "user", "content": "q"}], "solution": "b"}]
    context, fields = "{prompt} ({solution})", {"instruction": "Be short."}
    assert told(load(rows[:1], context, **fields).prompts[0]) == "1+1\n\nBe short. (2)"
    text, message = load(rows, context, CHAT, chat_template=True, **fields).prompts
    assert "1+1\n\nBe short. (2)" in told(text, CHAT)
    assert "q (b)" in told(message, CHAT) and "Be short." not in told(message, CHAT)


def test_with_a_chat_template_it_is_a_message_and_both_end_with_the_start_of_an_answer(load):
    """Not put behind what the template has made: a model would see it as its own answer."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    rows = [{"prompt": "q", "solution": "a"}, {"prompt": messages, "solution": "b"}]
    first, second = load(rows, "{prompt} ({solution})", CHAT, chat_template=True, system_prompt="s").prompts
    render = lambda content: CHAT.apply_chat_template(  # noqa: E731
        [{"role": "system", "content": "s"}, {"role": "user", "content": content}], tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    for prompt, solution in ((first, "a"), (second, "b")):
        assert told(prompt, CHAT) == render(f"q ({solution})") and CHAT.decode(prompt.token_ids) == render("q")
        assert prompt.context_ids[-3:] == prompt.token_ids[-3:], "the answer follows on the same tokens"


@pytest.mark.parametrize(
    ("rows", "context", "said"),
    [
        ([{"prompt": "q"}], "{solution}", r"jsonl:1: there is no column 'solution'; .*\(teacher.context chooses\)"),
        ([{"prompt": "q", "solution": None}], "{solution}", "jsonl:1: solution is null"),
        ([{"prompt": "q", "solution": math.nan}], "{prompt} {solution}", r"jsonl:1: solution is missing \(NaN\)$"),
        ([{"prompt": "q", "s": {"a": math.nan}}], "{prompt} ({s.a})", r"jsonl:1: s.a is missing \(NaN\)$"),
        ([{"prompt": "q", "solution": ""}], "{prompt} ({solution})", "jsonl:1: solution is empty; teacher.context"),
        ([{"prompt": "q", "solution": " \n"}], "{solution}", "jsonl:1: solution is empty; teacher.context"),
        ([{"prompt": "q", "solution": ["a"]}], "{solution}", "solution is a list; teacher.context is made of text"),
    ],
)
def test_a_column_that_has_no_text_is_named_with_its_row(load, rows, context, said):
    with pytest.raises(DataError, match=said):
        load(rows, context)


def test_a_gap_in_a_column_of_numbers_is_no_hint(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": ["1+1", "1+2"], "solution": [2.0, math.nan]}), path)
    with pytest.raises(DataError, match=r"p\.parquet, row 2: solution is missing \(NaN\)$"):
        load_prompts(DataConfig(path=str(path)), PLAIN, None, teachers={"default": "{prompt} ({solution})"})


def test_rows_with_one_prompt_and_other_hints_are_none_that_repeat(load):
    rows = [{"prompt": "1", "solution": s} for s in ("2", "3", "2")]
    found = load(rows, "{prompt} ({solution})", dedupe=True)
    assert [told(p) for p in found.prompts] == ["1 (2)", "1 (3)"] and found.repeated == 1
    assert len(load(rows, None, dedupe=True).prompts) == 1, "where the teacher is told the prompt, they are one"


@pytest.mark.parametrize(
    ("context", "said"),
    [
        ("{solution", "expected '}' before end of string; a column is {name}"),
        ("a } b", "Single '}' encountered in format string"),
        ("{solution!r}", "only names of columns may stand in braces"),
        ("{n:>5}", "only names of columns may stand in braces"),
        ("{}", "names no column; a brace of the text is written twice"),
        ("the answer is 7", "names no column: write {solution}"),
    ],
)
def test_a_template_that_is_none_is_refused(context, said):
    with pytest.raises(ValidationError) as error:
        TeacherConfig(path="t", context=context)
    assert said in str(error.value)


def test_what_is_too_long_for_the_teacher_is_left_out_or_refused(load):
    rows = [{"prompt": "12", "solution": "3"}, {"prompt": "12", "solution": "345678"}]
    found = load(rows, "{solution}{prompt}", longest=5)
    assert (len(found.prompts), found.skipped_too_long, found.longest, found.longest_scored) == (1, 1, 2, 3)
    with pytest.raises(DataError, match=r"jsonl:2: teacher\.context has 8 tokens, the models take 5"):
        load(rows, "{solution}{prompt}", longest=5, too_long="refuse")


def test_a_resume_finds_out_that_the_teacher_is_told_something_else(load):
    rows = [{"prompt": "1", "solution": "2"}]
    one, other, none = (load(rows, c).digest for c in ("{solution}{prompt}", "{prompt}{solution}", None))
    assert len({one, other, none}) == 3
    assert load(rows, None).digest == none


@pytest.mark.parametrize("takes_over", [False, True])
def test_the_scorer_gets_the_context_and_the_learner_the_prompt(load, takes_over):
    """From the row to the learner's sample; where another scorer takes over, it gets the context again."""
    prompts = load([{"prompt": "12", "solution": "345"}], "{solution}{prompt}").prompts
    config = make_config("a", "b", rollout={"prompts_per_step": 1})
    (spec,) = rollout_specs(PromptOrder(prompts, 0, False), config, range(1))
    assert spec.prompt_ids == prompts[0].token_ids and spec.scored_prompt == prompts[0].context_ids
    pending = PendingRollout(spec.rollout_id, spec.scored_prompt, scorer=0)
    chunks = []
    for token in (7, 8):
        pending.known = pending.known and not takes_over
        pending.add([token], np.array([[token, 1]], np.int32), np.array([[-1.0, -2.0]], np.float32))
        pending.end = EngineEnd.EOS if token == 8 else EngineEnd.RUNNING
        chunks.append(build_chunk([pending], [], attempt=0, top_k=1, vocabulary=100))
    assert chunks[0].context(0).tolist() == list(spec.context_ids)
    assert chunks[1].context(0).tolist() == ([*spec.context_ids, 7] if takes_over else [])
    rows = [TeacherRows(np.zeros((1, 1), np.float16), np.zeros(1, np.float32), np.zeros(1, np.float32))] * 2
    (sample,) = collect_samples(chunks, rows, [KeptRollout.of(spec, 2)])
    assert sample.prompt_ids.tolist() == list(spec.prompt_ids) and sample.token_ids.tolist() == [7, 8]
    assert sample.input_length == 2 + 2 - 1, "the learner's pass has the student's prompt"
    plain = replace(spec, context_ids=None)
    assert KeptRollout.of(plain, 2).prompt_ids is None and plain.scored_prompt == spec.prompt_ids


def test_the_recipe_tells_the_teacher_each_rows_solution(tmp_path):
    config = load_config(ROOT / "docs/recipes/self-distillation-gsm8k.yaml")
    (group,) = config.scorer_groups
    assert group.follows_student and config.guards.context_leak and config.evaluation.every
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"question": "1+1?", "answer": "1+1=2\n#### 2"}) + "\n")
    data = config.data.model_copy(update={"path": str(path)})
    (prompt,) = load_prompts(data, CHAT, None, teachers=config.teacher_contexts).prompts
    own, more = CHAT.decode(prompt.token_ids), CHAT.decode(prompt.context_ids)
    assert "1+1?" in own and "1+1=2" not in own and "1+1=2" in more and more[-9:] == own[-9:]
