"""Data sets as they are at the hub: slices, streams, renamed columns, repetitions, several with weights."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kat_ray.config import Config, DataConfig, EvaluationConfig
from kat_ray.data.mixture import epoch
from kat_ray.data.prompt_order import PromptOrder
from kat_ray.data.prompts import load_prompts
from kat_ray.errors import DataError
from tests.support.tokenizers import TEMPLATE, make_tokenizer

PLAIN = make_tokenizer()


def load(tokenizer=PLAIN, graded=False, **data):
    return load_prompts(DataConfig(**data), tokenizer, None, graded=graded)


def texts(found):
    return [PLAIN.decode(p.token_ids) for p in found.prompts]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set as the hub has it: two configurations of Parquet and JSON files, described in README.md."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "set"
    (root / "main").mkdir(parents=True)
    for split, count in (("train", 20), ("test", 5)):
        rows = {"question": [f"{split}{n}" for n in range(count)], "final": [f"so #### {n}" for n in range(count)]}
        pq.write_table(pa.table(rows), root / "main" / f"{split}.parquet")
    write(root / "other.jsonl", [{"question": "other", "final": "1"}])
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train.parquet}\n"
        "  - {split: test, path: main/test.parquet}\n- config_name: other\n  data_files: other.jsonl\n---\n"
    )
    return str(root)


COLUMNS = {"rename": {"question": "prompt", "final": "answer"}, "answer_after": "####"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("split", "first", "count"),
    [("train", 0, 20), ("test", 0, 5), ("train[:3]", 0, 3), ("train[3:6]", 3, 3), ("train[18:]", 18, 2)],
)
def test_a_split_and_its_slices_are_the_same_rows_streamed_or_not(folder, split, first, count, streaming):
    found = load(path=folder, name="main", split=split, streaming=streaming, **COLUMNS)
    name = split.split("[")[0]
    assert texts(found) == [f"{name}{n}" for n in range(first, first + count)]
    assert [p.answer for p in found.prompts] == [str(n) for n in range(first, first + count)]
    assert [p.prompt_id for p in found.prompts] == [f"set:{n}" for n in range(1, count + 1)]


def test_sums_and_shares_of_splits_are_of_whole_data_sets(folder):
    assert len(load(path=folder, name="main", split="train+test", **COLUMNS).prompts) == 25
    assert texts(load(path=folder, name="main", split="train[10%:20%]", **COLUMNS)) == ["train2", "train3"]
    with pytest.raises(DataError, match=r"data.split = train\[10%:\]: with data.streaming = true it is one split"):
        load(path=folder, name="main", split="train[10%:]", streaming=True, **COLUMNS)


def test_a_stream_is_read_as_far_as_it_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "set"
    root.mkdir()
    write(root / "a.jsonl", [{"prompt": str(n)} for n in range(5)])
    (root / "b.jsonl").write_text("no JSON at all\n" * 2000)
    found = load(path=str(root), streaming=True, limit=4)
    assert texts(found) == ["0", "1", "2", "3"]
    with pytest.raises(DataError, match="no data set to be had"):
        load(path=str(root), streaming=True)


def test_columns_are_renamed_or_the_row_is_named(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"q": "a", "r": {"gold": 7}, "z": 1}, {"q": "b", "prompt": "c"}])
    found = load(path=path, limit=1, rename={"q": "prompt", "r.gold": "answer"})
    assert texts(found) == ["a"] and found.prompts[0].answer == "7"
    with pytest.raises(DataError, match=r"p.jsonl:2: data.rename: there is a column 'prompt' already, beside 'q'"):
        load(path=path, rename={"q": "prompt"})
    with pytest.raises(DataError, match=r"p.jsonl:1: there is no column 'x'; there are q, r, z \(data.rename"):
        load(path=path, rename={"x": "prompt"})


def test_an_instruction_stands_behind_a_question_and_in_its_message(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "2+2?"}])
    assert texts(load(path=path, instruction="Be brief.")) == ["2+2?\n\nBe brief."]
    found = load(make_tokenizer(chat_template=TEMPLATE), path=path, instruction="Be brief.", chat_template=True)
    assert texts(found) == ["[user]2+2?\n\nBe brief.[assistant]"]


def test_an_answer_stands_behind_the_last_mark(tmp_path):
    path = write(
        tmp_path / "p.jsonl", [{"prompt": "a", "answer": "1 #### 2 #### 3\n"}, {"prompt": "b", "answer": "4"}]
    )
    assert [p.answer for p in load(path=path, answer_after="####").prompts] == ["3", None]
    with pytest.raises(DataError, match=r"p.jsonl:2: answer holds no '####' \(evaluation.data.answer_after\)"):
        load(path=path, answer_after="####", graded=True)


def test_a_prompt_that_repeats_another_is_left_out_and_counted(tmp_path):
    rows = [("a", "1"), ("b", "1"), ("a", "1"), ("a", "2"), ("c", "3"), ("b", None)]
    path = write(tmp_path / "p.jsonl", [{"prompt": p, "answer": a} for p, a in rows])
    found = load(path=path, dedupe=True)
    assert texts(found) == ["a", "b", "c"] and (found.repeated, found.contradicting) == (3, 2)
    assert [p.prompt_id for p in found.prompts] == ["p:1", "p:2", "p:5"]
    whole = load(path=path)
    assert len(whole.prompts) == 6 and (whole.repeated, whole.contradicting) == (0, 0)


# --- several -------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    return {
        name: write(tmp_path / f"{name}.jsonl", [{key: f"{name}{n}", "id": n} for n in range(count)])
        for name, key, count in (("a", "prompt", 60), ("b", "q", 5), ("c", "prompt", 10))
    }


def mixed(three, **fields):
    mix = {"b": {"path": three["b"], "rename": {"q": "prompt"}, "weight": 2}, "c": {"path": three["c"], "limit": 4}}
    return load(path=three["a"], mix=mix, **fields)


def test_an_epoch_holds_data_sets_by_their_weights(three):
    found = mixed(three, weight=3.0)
    assert Counter(found.origins) == {"data": 60, "b": 5, "c": 4}
    drawn = Counter(p.prompt_id.split(":")[0] for p in found.drawn)
    assert drawn == {"data": 60, "b": 40, "c": 20}, "3 to 2 to 1, the largest once"
    times = Counter(p.prompt_id for p in found.drawn)
    assert {times[f"b:{n}"] for n in range(5)} == {8} and {times[f"c:{n}"] for n in range(4)} == {5}
    steps = [
        p.prompt_id.split(":")[0]
        for s in range(6)
        for p in PromptOrder(found.drawn, 0, True).take(range(20 * s, 20 * s + 20))
    ]
    assert Counter(steps) == drawn


def test_what_a_mixture_is_made_of_is_part_of_the_digest(three):
    assert mixed(three).digest == mixed(three).digest != mixed(three, weight=2.0).digest
    alone = load(path=three["a"])
    assert alone.drawn == alone.prompts and not alone.origins and alone.prompts[3].prompt_id == "3"


@given(
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 30), st.floats(0.1, 10)), min_size=2),
)
def test_no_data_set_is_further_from_its_share_than_rounding(sets):
    items = [(name, n) for name, (count, _) in sets.items() for n in range(count)]
    weights = {name: weight for name, (_, weight) in sets.items()}
    drawn = epoch(items, [name for name, _ in items], weights)
    scale = max(count / weight for count, weight in sets.values())
    times = Counter(drawn)
    for name, (count, weight) in sets.items():
        own = [times[name, n] for n in range(count)]
        assert abs(sum(own) - weight * scale) <= 0.5 + 1e-6 and max(own) - min(own) <= 1 and min(own) >= 1


def test_an_epoch_that_would_never_end_is_refused(three):
    with pytest.raises(DataError, match=r"an epoch would have .* prompts, for the data set of 4"):
        mixed(three, weight=1e-7).drawn  # noqa: B018


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weight": 2.0}, "weight = 2: is a share beside those of other data sets"),
        ({"mix": {"b": {"path": "b"}}, "teacher_column": "t"}, "without an environment and without teacher_column"),
        ({"mix": {"b": {"path": "b", "weight": 0}}}, "greater than 0"),
        ({"mix": {"b.c": {"path": "b"}}}, "mix: 'b.c' is no name of a data set"),
        ({"mix": {"data": {"path": "b"}}}, "mix: 'data' is no name of a data set"),
        ({"mix": {"b": {"path": "s3://b"}}}, "is the address of an object store"),
    ],
)
def test_what_cannot_be_mixed_is_refused(fields, says):
    with pytest.raises(ValidationError, match=says):
        DataConfig(path="a.jsonl", **fields)


def test_held_out_problems_are_not_mixed():
    data = {"path": "a", "mix": {"b": {"path": "b"}}}
    with pytest.raises(ValidationError, match=r"name held-out sets of their own in evaluation\.sets"):
        EvaluationConfig(data=data)
    assert Config.model_validate({"student": {"path": "a"}, "teacher": {"path": "b"}, "data": data})


def test_a_data_set_of_a_mixture_that_gives_nothing_is_named(three, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match=r"empty.jsonl: holds no prompts"):
        load(path=three["a"], mix={"e": {"path": str(empty)}})
    with pytest.raises(DataError, match=r"data\.mix: no prompt of 'again' is left"):
        load(path=three["a"], mix={"again": {"path": three["a"]}}, dedupe=True)
