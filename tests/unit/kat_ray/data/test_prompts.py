"""Prompts: what is read, and what is refused by file and line."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kat_ray.config import DataConfig
from kat_ray.data.chat import chat_template_of, turn_end
from kat_ray.data.golds import training_golds
from kat_ray.data.prompts import load_prompts
from kat_ray.errors import DataError
from kat_ray.rewards.integers import gold_integer
from tests.support.tokenizers import TEMPLATE, make_tokenizer

PLAIN = make_tokenizer()
CHAT = make_tokenizer(chat_template=TEMPLATE)


@pytest.fixture
def jsonl(tmp_path):
    def _write(*rows):
        path = tmp_path / "p.jsonl"
        path.write_bytes(b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows))
        return str(path)

    return _write


def load(path, tokenizer=PLAIN, longest=None, graded=False, section=None, **fields):
    return load_prompts(DataConfig(path=path, **fields), tokenizer, longest, graded=graded, section=section)


def refusal(path, *args, **kwargs):
    with pytest.raises(DataError) as error:
        load(path, *args, **kwargs)
    return str(error.value).replace(str(path), "F")


def text_of(prompt, tokenizer=PLAIN):
    return tokenizer.decode(prompt.token_ids)


def test_jsonl_rows_ids_and_answers(jsonl):
    path = jsonl(
        {"prompt": "1+1=", "answer": 2}, b"\n", {"prompt": "x", "answer": " y ", "id": "own"}, {"prompt": "z"}
    )
    found = load(path)
    assert [p.prompt_id for p in found.prompts] == ["p:1", "own", "p:4"]
    assert [text_of(p) for p in found.prompts] == ["1+1=", "x", "z"]
    assert [p.answer for p in found.prompts] == ["2", "y", None]
    assert (found.skipped_too_long, found.source, found.longest) == (0, path, 4)


def test_chosen_columns_byte_order_mark_and_no_final_newline(jsonl):
    path = jsonl(b'\xef\xbb\xbf{"q": "1", "a": "2"}\n{"q": "3", "a": "4"}')
    found = load(path, prompt_column="q", answer_column="a")
    assert [(text_of(p), p.answer) for p in found.prompts] == [("1", "2"), ("3", "4")]
    assert load(path, prompt_column="q", answer_column=None).prompts[0].answer is None


def test_limit_takes_the_first_rows_and_does_not_read_on(jsonl):
    found = load_prompts(
        DataConfig(path=jsonl({"prompt": "a"}, {"prompt": "b"}, b"broken\n"), limit=2), PLAIN, None
    )
    assert [text_of(p) for p in found.prompts] == ["a", "b"]


def test_more_rows_than_one_batch(jsonl):
    found = load(jsonl(*({"prompt": str(i)} for i in range(2500))))
    assert [text_of(p) for p in found.prompts] == [str(i) for i in range(2500)]
    assert found.prompts[-1].prompt_id == "p:2500"


def test_parquet(tmp_path):
    path = str(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": [1, None]}), path)
    assert [(p.prompt_id, text_of(p), p.answer) for p in load(path).prompts] == [
        ("p:1", "a", "1"),
        ("p:2", "b", None),
    ]
    assert refusal(path, graded=True) == "F, row 2: answer is null"


def test_hugging_face_data_set(tmp_path, jsonl, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a", "answer": "0"}\n{"prompt": "", "answer": "0"}\n')
    (folder / "test.jsonl").write_text('{"prompt": "b", "answer": "1"}\n')
    found = load(str(folder), split="test")
    assert [(p.prompt_id, text_of(p), p.answer) for p in found.prompts] == [("set:1", "b", "1")]
    assert refusal(str(folder)) == "F (split train), row 2: prompt is empty"
    assert refusal(str(folder), split="dev").startswith("F (split dev): no such file, and no data set to be had")


def test_configurations_of_a_hugging_face_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    for name in ("main", "socratic"):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text(json.dumps({"prompt": name, "answer": "0"}) + "\n")
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/*.jsonl\n" for n in ("main", "socratic"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert text_of(load(str(folder), name="socratic").prompts[0]) == "socratic"
    for fields in ({}, {"name": "man"}):
        message = refusal(str(folder), **fields)
        assert "main" in message and "socratic" in message and "data.name chooses" in message
    assert "F (name man, split train): no such file" in message


def test_chat_template_for_text_and_messages(jsonl):
    path = jsonl(
        {"prompt": "hi"}, {"prompt": [{"role": "system", "content": "own"}, {"role": "user", "content": "yo"}]}
    )
    found = load(path, CHAT, chat_template=True, system_prompt="sys")
    assert [text_of(p) for p in found.prompts] == [
        "[system]sys[user]hi[assistant]",
        "[system]own[user]yo[assistant]",
    ]
    assert text_of(load(path, CHAT, chat_template=True).prompts[0]) == "[user]hi[assistant]"


def test_special_tokens_come_from_the_tokenizer_or_from_the_template_not_from_both(jsonl):
    tokenizer = make_tokenizer(chat_template=TEMPLATE, bos=True)
    path = jsonl({"prompt": "ab"})
    assert load(path, tokenizer).prompts[0].token_ids == (0, 3, 4)
    assert load(path, tokenizer, chat_template=True).prompts[0].token_ids[0] != 0


@pytest.mark.parametrize("source", ["student", "teacher", "file"])
@pytest.mark.parametrize("written", [False, True])
def test_a_text_begins_with_one_bos_whoever_writes_it(jsonl, tmp_path, source, written):
    """The student's tokenizer puts <pad> before a text. Its own template says itself whether that is wanted."""
    template = ("<pad>" if written else "") + TEMPLATE
    (tmp_path / "own.jinja").write_text(template)
    student = make_tokenizer(chat_template=template, bos=True)
    teacher = make_tokenizer(chat_template=template, bos=True)
    data = DataConfig(
        path=jsonl({"prompt": "ab"}, {"prompt": "<pad>ab"}),
        chat_template=str(tmp_path / "own.jinja") if source == "file" else source,
    )
    first, _ = load_prompts(data, student, None, teacher=teacher).prompts
    opened = first.token_ids[:2].count(0)
    assert opened == (0 if source == "student" and not written else 1)
    assert student.decode(first.token_ids).removeprefix("<pad>") == "[user]ab[assistant]"


def test_a_text_that_was_rendered_before_is_not_given_a_second_bos(jsonl):
    tokenizer = make_tokenizer(bos=True)
    found = load(jsonl({"prompt": "<pad>ab"}, {"prompt": "ab"}, {"prompt": "<pad><pad>a"}), tokenizer)
    assert [p.token_ids for p in found.prompts] == [(0, 3, 4), (0, 3, 4), (0, 0, 3)]
    plain = load(jsonl({"prompt": "<pad>ab"}), make_tokenizer())
    assert plain.prompts[0].token_ids == (0, 3, 4), "nothing is added, and nothing taken away"


def test_the_end_of_a_turn_is_the_special_token_behind_an_answer():
    def end(behind, **changes):
        template = TEMPLATE.replace("{% endfor %}", behind + "{% endfor %}")
        tokenizer = make_tokenizer(chat_template=template)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
        return turn_end(chat_template_of(DataConfig(path="x", chat_template=True), tokenizer)), tokenizer

    for behind in ("<|end|>", "<|end|>\n", "\n<|end|>\n", "{{ '<|end|>' }}<|end|>"):
        found, tokenizer = end(behind)
        assert found == tokenizer.convert_tokens_to_ids("<|end|>"), behind
    assert end("")[0] is None and end("\n")[0] is None and end("[end]")[0] is None
    assert end("</s>")[0] == 1
    assert end("{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}")[0] is None


def test_too_long_prompts_are_skipped_and_counted_or_refused(jsonl):
    path = jsonl({"prompt": "abc"}, {"prompt": "abcd"}, {"prompt": "ab"})
    found = load(path, longest=3)
    assert ([text_of(p) for p in found.prompts], found.skipped_too_long) == (["abc", "ab"], 1)
    assert [p.prompt_id for p in found.prompts] == ["p:1", "p:3"]
    assert refusal(path, longest=3, too_long="refuse").startswith("F:2: the prompt has 4 tokens, the models take 3")
    assert refusal(path, longest=1).startswith("F: every one of 3 prompts is longer than the 1 tokens")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "F: holds no prompts"),
        ([b"\n\n"], "F: holds no prompts"),
        ([{"prompt": "a"}, b'{"prompt": \n'], "F:2: not valid JSON: Expecting value (column"),
        ([b"[1]\n"], "F:1: a row is a JSON object with columns, this is a list"),
        ([{"prompt": "a"}, b'{"prompt": "\xff"}\n'], "F:2: not UTF-8 (byte 13 of the line)"),
        (
            [{"prompts": "a", "answer": 1}],
            "F:1: there is no column 'prompt'; there are prompts, answer (data.prompt_column",
        ),
        ([{"prompt": None}], "F:1: prompt is null"),
        ([{"prompt": 3}], "F:1: prompt is a number; a prompt is text or a list of messages"),
        ([{"prompt": ""}], "F:1: prompt is empty"),
        ([{"prompt": " \n"}], "F:1: prompt is empty"),
        ([{"prompt": []}], "F:1: prompt is empty"),
        (
            [{"prompt": [{"role": "user", "content": "x"}]}],
            "F:1: prompt is a list of messages; set data.chat_template",
        ),
        ([{"prompt": "a", "answer": [1]}], "F:1: answer is a list; an answer is text or a number"),
        ([{"prompt": "a", "answer": True}], "F:1: answer is true or false; an answer"),
        (
            [{"prompt": "a", "id": 7}, {"prompt": "b", "id": "7"}],
            "F:2: the id '7' is also that of F:1; ids must be unique",
        ),
        ([b"[" * 100_000 + b"\n"], "F:1: not a row: nested too deeply"),
        ([b'{"prompt": ' + b"9" * 5000 + b"}\n"], "F:1: not a row: a number of more digits than Python converts"),
        ([b'{"prompt": "a", "more": ["\\ud800"]}\n'], "F:1: holds half a character"),
        ([{"x" * 5000: 1}], f"F:1: there is no column 'prompt'; there are {'x' * 37}... ("),
    ],
)
def test_malformed_rows_are_named(jsonl, rows, message):
    path = jsonl(*rows)
    assert refusal(path).replace(path, "F").startswith(message)


def test_graded_problems_need_answers(jsonl):
    path = jsonl({"prompt": "a", "answer": "1"}, {"prompt": "b"})
    assert refusal(path, graded=True).startswith(
        "F:2: there is no column 'answer'; there are prompt (evaluation.data.answer_column"
    )
    of = dict(graded=True, section="evaluation.sets.math.data")
    assert "(evaluation.sets.math.data.answer_column chooses)" in refusal(path, **of)
    whole = jsonl({"prompt": "a", "answer": "1"})
    assert "(evaluation.sets.math.data.prompt_column chooses)" in refusal(whole, prompt_column="q", **of)
    assert refusal(jsonl({"prompt": "a", "answer": " "}), graded=True) == "F:1: answer is empty"


def test_bad_messages(jsonl):
    path = jsonl({"prompt": [{"role": "tool", "content": "x"}]})
    assert refusal(path, CHAT, chat_template=True) == "F:1: the chat template refuses the messages: no tools"
    assert refusal(jsonl({"prompt": ["x"]}), CHAT, chat_template=True).startswith(
        "F:1: prompt: a message has role and content"
    )
    assert refusal(path, PLAIN, chat_template=True) == (
        "data.chat_template = true: the student's tokenizer has no chat template; it may be teacher, or a file "
        "with one"
    )


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{"role": "user", "content": None}],
            "the content of a message is null; it must be text, or a list of text",
        ),
        ([{"role": "user", "content": 3}], "the content of a message is a number; it must be text"),
        ([{"role": 3, "content": "x"}], "the role of a message is a number; it must be text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": "b"}]}],
            "a part of a message is {'type': 'image', 'image': 'b'}; only {type: text",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "a part of a message is {'type': 'text'"),
        ([{"role": "user", "content": ["x"]}], "a part of a message is x; only {type"),
        ([USER, {"role": "assistant", "content": "y"}], "the last message is the assistant's; an answer follows"),
        ([{"role": "system", "content": "y"}], "the last message is the system's; an answer follows"),
    ],
)
def test_messages_that_no_answer_can_follow_are_named(jsonl, messages, message):
    path = jsonl({"prompt": [USER]}, {"prompt": messages})
    assert refusal(path, CHAT, chat_template=True).startswith(f"F:2: prompt: {message}")


def test_parts_of_text_are_joined(jsonl, tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rows = {"prompt": [{"role": "user", "content": parts}]}
    assert text_of(load(jsonl(rows), CHAT, chat_template=True).prompts[0]) == "[user]ab[assistant]"
    pq.write_table(pa.Table.from_pylist([rows]), tmp_path / "parts.parquet")
    assert (
        text_of(load(str(tmp_path / "parts.parquet"), CHAT, chat_template=True).prompts[0]) == "[user]ab[assistant]"
    )


def test_the_template_may_be_the_teacher_s_or_a_file_s(jsonl, tmp_path):
    path, prompt = jsonl({"prompt": "hi"}), "<u>hi<a>"
    other = "{% for m in messages %}<u>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    teacher = make_tokenizer(chat_template=other)

    def loaded(student, source):
        data = DataConfig(path=path, chat_template=source)
        return text_of(load_prompts(data, student, None, teacher=teacher).prompts[0])

    assert loaded(PLAIN, "teacher") == loaded(CHAT, "teacher") == prompt
    assert loaded(CHAT, "student") == loaded(CHAT, True) == "[user]hi[assistant]"
    (tmp_path / "own.jinja").write_text(other)
    assert loaded(PLAIN, str(tmp_path / "own.jinja")) == prompt
    assert refusal(path, PLAIN, chat_template="teacher") == (
        "data.chat_template = teacher: the teacher's tokenizer has no chat template; it may be student, or a file "
        "with one"
    )
    assert refusal(path, PLAIN, chat_template="techer") == (
        "data.chat_template = techer: must be true, false, student, teacher or a file with a Jinja template; as a "
        "file it cannot be read: No such file or directory"
    )


def test_arguments_of_the_template(jsonl):
    tokenizer = make_tokenizer(
        chat_template=TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}[none]{% endif %}"
    )
    path = jsonl({"prompt": "hi"})

    def loaded(**arguments):
        return text_of(load(path, tokenizer, chat_template=True, chat_template_kwargs=arguments).prompts[0])

    assert loaded(enable_thinking=False) == "[user]hi[assistant][none]"
    assert loaded(enable_thinking=True) == loaded() == "[user]hi[assistant]"
    misspelt = refusal(path, tokenizer, chat_template=True, chat_template_kwargs={"enable_thnking": False})
    assert misspelt == "data.chat_template_kwargs.enable_thnking: the chat template does not use this name"


def test_dotted_paths_name_fields_within_columns(jsonl, tmp_path):
    row = {"prompt": "a", "reward_model": {"style": "rule", "ground_truth": "34"}, "x.y": "dot", "x": {"y": "no"}}
    path = jsonl(row)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    for file in (path, str(tmp_path / "p.parquet")):
        assert load(file, answer_column="reward_model.ground_truth").prompts[0].answer == "34"
        assert load(file, answer_column="x.y").prompts[0].answer == "dot", "a column of that name comes first"
        assert text_of(load(file, prompt_column="reward_model.style").prompts[0]) == "rule"
    lacks = refusal(path, answer_column="reward_model.truth", graded=True)
    assert lacks == (
        "F:1: there is no column 'reward_model.truth'; in reward_model there are style, ground_truth "
        "(evaluation.data.answer_column chooses)"
    )
    assert refusal(path, prompt_column="q.a").startswith(
        "F:1: there is no column 'q.a'; there are prompt, reward_m"
    )


def test_a_column_of_answers_that_was_chosen_must_be_there(jsonl):
    path = jsonl({"prompt": "a", "anser": "1"}, {"prompt": "b", "other": 2})
    assert refusal(path, answer_column="solution") == (
        "F: no row has an answer in column 'solution'; there are prompt, anser, other (data.answer_column chooses; "
        "null where answers are not graded)"
    )
    assert [p.answer for p in load(path).prompts] == [None, None], "the default column need not be there"
    assert [p.answer for p in load(path, answer_column="anser").prompts] == ["1", None]


def test_answers_that_are_missing_in_a_column_of_numbers(tmp_path):
    path = str(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": [34.0, float("nan")]}), path)
    first, second = load(path).prompts
    assert (gold_integer(first.answer), second.answer) == ("34", None)
    assert refusal(path, graded=True) == "F, row 2: answer is missing (NaN)"


def test_a_gap_is_one_in_every_column(tmp_path):
    """pandas writes a gap in a column of numbers as NaN: no id, no prompt, and no source."""
    path, gap = str(tmp_path / "p.parquet"), [1.0, float("nan")]
    pq.write_table(pa.table({"prompt": ["a", "b"], "id": gap, "n": gap, "s": [{"n": n} for n in gap]}), path)
    assert [p.prompt_id for p in load(path).prompts] == ["1.0", "p:2"]
    assert refusal(path, source_column="n").startswith("F, row 1: n is a number; a source is")
    pq.write_table(pa.table({"prompt": ["b"], "n": gap[1:], "s": [{"n": gap[1]}]}), path)
    assert refusal(path, source_column="n") == "F, row 1: n is missing (NaN)"
    assert refusal(path, source_column="s.n") == "F, row 1: s.n is missing (NaN)"
    assert refusal(path, prompt_column="n") == "F, row 1: n is missing (NaN)"


def training(rows, verifier="integer", **fields):
    data = DataConfig(path=rows, **fields)
    return training_golds(data, load_prompts(data, PLAIN, None), verifier)


def test_training_rollouts_are_graded_where_they_can_be(jsonl):
    path = jsonl({"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "so #### 2"}, {"prompt": "c"})
    golds = training(path)
    assert golds.answers == {"p:1": "1"}
    assert golds.note.replace(path, "F").startswith(
        "F: 1 of 2 gold answers can match no answer; first of problem p:2: the gold answer 'so #### 2' is not an "
        "integer"
    )
    assert training(jsonl({"prompt": "a", "answer": "1"})).note is None


def test_gold_answers_of_a_column_that_was_chosen_must_be_usable(jsonl):
    path = jsonl({"prompt": "a", "gold": "1"}, {"prompt": "b", "gold": "$"})
    with pytest.raises(DataError, match=r"1 of 2 gold answers can match no answer; first of problem p:2.*'\$'"):
        training(path, answer_column="gold")
    with pytest.raises(
        DataError, match=r"first of problem p:2: .*'\$': math-verify does not find it equal to itself"
    ):
        training(path, "math", answer_column="gold")


def test_files_that_cannot_be_read(tmp_path):
    assert refusal(str(tmp_path / "no.jsonl")) == "F: cannot be read: No such file or directory"
    (tmp_path / "x.parquet").write_bytes(b"no parquet at all")
    assert refusal(str(tmp_path / "x.parquet")).startswith("F: not a Parquet file")
    assert refusal(str(tmp_path / "no.parquet")).startswith("F: cannot be read")
    (tmp_path / "x.csv").write_text("prompt\na\n")
    assert refusal(str(tmp_path / "x.csv")).startswith("F: prompts are read from .jsonl and .parquet files")


def test_parquet_that_python_or_unicode_cannot_hold(tmp_path):
    far = pa.array([2**62], pa.int64()).view(pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": ["a"], "when": far}), tmp_path / "far.parquet")
    assert "rows 1 to 1: a value has no like in Python" in refusal(str(tmp_path / "far.parquet"))
    offsets = pa.array([0, 1], pa.int32()).buffers()[1]
    torn = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"prompt": torn}), tmp_path / "torn.parquet")
    assert "not a Parquet file: " in refusal(str(tmp_path / "torn.parquet"))


def test_what_reward_functions_are_told_of_a_row(jsonl):
    """Answers and columns as they stand there; an answer that is no text is theirs alone."""
    chat = [{"role": "user", "content": "1+1="}]
    path = jsonl(
        {"prompt": chat, "gold": {"any": [2, "two"]}, "level": 3, "id": "own"}, {"prompt": "x", "gold": " 7 "}
    )
    fields = {"answer_column": "gold", "chat_template": True}
    data = DataConfig(path=path, **fields)
    found = load_prompts(data, CHAT, None, with_tasks=True)
    assert [p.answer for p in found.prompts] == [None, "7"]
    first, second = found.tasks["own"], found.tasks["p:2"]
    assert (first.prompt, first.answer, first.columns) == (
        chat, {"any": [2, "two"]}, {"gold": {"any": [2, "two"]}, "level": 3, "id": "own"}
    )  # fmt: skip
    assert (second.prompt, second.answer, second.columns, second.source) == ("x", " 7 ", {"gold": " 7 "}, path)
    assert CHAT(first.prompt_text, add_special_tokens=False)["input_ids"] == list(found.prompts[0].token_ids)
    assert training_golds(data, found, "integer", rewards_need_them=False).answers == {"p:2": "7"}
    assert refusal(path, CHAT, **fields) == "F:1: gold is an object; an answer is text or a number"
    assert load(jsonl({"prompt": "a", "gold": "7"}), answer_column="gold").tasks == {}


def test_columns_that_rewards_may_depend_on_are_part_of_the_digest(jsonl):
    def digest(row, with_tasks):
        return load_prompts(DataConfig(path=jsonl(row)), PLAIN, None, with_tasks=with_tasks).digest

    one, other = {"prompt": "a", "level": 1}, {"prompt": "a", "level": 2}
    assert digest(one, True) == digest(one, True) != digest(other, True)
    assert digest(one, False) == digest(other, False)


def test_columns_that_json_cannot_hold_are_left_out(tmp_path):
    path = str(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": ["a"], "picture": [b"\x89PNG"], "level": [1.5]}), path)
    found = load_prompts(DataConfig(path=path), PLAIN, None, with_tasks=True)
    assert dict(found.tasks["p:1"].columns) == {"level": 1.5}


def test_gold_answers_that_only_functions_use_need_no_verifier(jsonl):
    path = jsonl({"prompt": "a", "gold": "def f(): ..."}, {"prompt": "b", "gold": "3"})
    data = DataConfig(path=path, answer_column="gold")
    golds = training_golds(data, load_prompts(data, PLAIN, None), "integer", rewards_need_them=False)
    assert (golds.answers, golds.note) == ({"p:2": "3"}, None)


def test_what_reward_functions_cannot_be_told_of_is_named(tmp_path):
    message = {"role": "user", "content": "a", "sent": datetime.datetime(2026, 1, 1)}
    path = str(tmp_path / "chats.parquet")
    pq.write_table(pa.table({"prompt": [[message]], "answer": [float("nan")]}), path)
    data = DataConfig(path=path, chat_template=True)
    with pytest.raises(DataError, match="prompt holds what reward functions cannot be told of"):
        load_prompts(data, CHAT, None, with_tasks=True)
    pq.write_table(pa.table({"prompt": ["a"], "answer": [float("nan")]}), path)
    assert load_prompts(DataConfig(path=path), PLAIN, None, with_tasks=True).tasks["chats:1"].answer is None
