"""Fuzzed prompt files, read as a run reads them."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from kat_ray.config import DataConfig, ModelConfig
from kat_ray.data.prompts import load_prompts
from kat_ray.errors import UserError
from kat_ray.models.inspect import load_tokenizer
from kat_ray.rewards.verifiers import check_golds
from tests.fuzz.harness import deadline, fuzz, mutated, numbers, scalars, sizes, texts, trees

ROWS = [
    {"prompt": "3 + 4\n", "answer": "7"}, {"prompt": "12 - 5\n", "answer": 7, "id": "b"},
    {"prompt": "6 * 7\n", "answer": "42", "more": [1, {"a": None}]},
]  # fmt: skip
JSONL = "".join(json.dumps(r) + "\n" for r in ROWS).encode()
MESSAGES = [{"prompt": [{"role": "user", "content": "3 + 4"}], "answer": "7"}]
FLAG = st.booleans()
CHAT = "".join(json.dumps(r) + "\n" for r in MESSAGES).encode()


@pytest.fixture(scope="module")
def tokenizers():
    """The demo's tokenizer, and the same with a chat template."""
    plain, chat = (load_tokenizer(ModelConfig(path="demo:student")) for _ in range(2))
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return plain, chat


@pytest.fixture
def read(tmp_path, monkeypatch, tokenizers):
    """Reads a file as `actors.driver.train.prepare` does; it is read, or one `UserError` says why not."""
    monkeypatch.chdir(tmp_path)

    def read(name, content, chat, graded):
        Path(name).write_bytes(content)
        data = DataConfig(path=name, chat_template=chat)
        try:
            with deadline():
                found = load_prompts(data, tokenizers[chat], 200, graded=graded)
                if graded:
                    check_golds(found.prompts, "integer")
        except UserError as error:
            str(error).encode("utf-8", "backslashreplace")
            assert str(error) and len(str(error)) < 5_000
            return
        assert found.prompts and all(p.token_ids for p in found.prompts)

    return read


def as_line(tree):
    return json.dumps(tree).encode() + b"\n"


columns = st.sampled_from(["prompt", "answer", "id", "role", "content"])
messages = st.dictionaries(columns, st.one_of(texts, trees), max_size=3)
cells = st.one_of(
    scalars, trees, st.lists(st.dictionaries(columns, st.one_of(texts, trees), max_size=3), max_size=2)
)
rows = st.dictionaries(st.one_of(columns, texts), cells, max_size=4)


@sizes(270)
def test_lines(read, cases):
    content = st.one_of(
        mutated(JSONL), mutated(CHAT), st.lists(rows.map(as_line), min_size=1, max_size=3).map(b"".join),
        st.tuples(st.just(JSONL), rows.map(as_line)).map(b"".join), trees.map(as_line), st.binary(max_size=40),
        st.sampled_from(["utf-16", "utf-8-sig", "latin-1", "utf-32"]).map((JSONL.decode() + "é").encode),
    )  # fmt: skip
    fuzz(lambda content, chat, graded: read("p.jsonl", content, chat, graded), cases, content, FLAG, FLAG)


def parquet(table):
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


TABLE = pa.table({"prompt": ["3 + 4\n", "12 - 5\n"], "answer": ["7", "7"]})
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
KINDS = [
    pa.int8(), pa.float64(), pa.string(), pa.binary(), pa.bool_(), pa.timestamp("ns"), pa.date32(), pa.null(),
    pa.decimal128(5, 2), pa.list_(pa.string()), MESSAGE, pa.list_(MESSAGE), pa.large_string(), pa.duration("s"),
    pa.dictionary(pa.int32(), pa.string()), pa.time64("ns"), pa.map_(pa.string(), pa.int32()), pa.binary(4),
]  # fmt: skip


def a_value(kind):
    """A row of a type: what its default is in Arrow, or null."""
    try:
        return pa.array([None, 1], pa.int64()).cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(2, kind)


far = st.integers(-(2**63), 2**63 - 1).map(lambda n: pa.array([n, n], pa.int64()))
times = st.tuples(far, st.sampled_from([pa.timestamp("ns"), pa.timestamp("us", "UTC")])).map(
    lambda t: t[0].view(t[1])
)


@sizes(200)
def test_parquet(read, cases):
    typed = st.tuples(
        st.sampled_from(["prompt", "answer", "id"]), st.one_of(st.sampled_from(KINDS).map(a_value), far, times)
    )
    bad_text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 3], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe\xfd")]
    )

    def with_column(drawn):
        name, column = drawn
        table = TABLE.drop_columns([name]) if name in TABLE.column_names else TABLE
        return parquet(table.append_column(name, column))

    content = st.one_of(
        mutated(parquet(TABLE)), typed.map(with_column), st.just(parquet(TABLE.set_column(0, "prompt", bad_text))),
        st.just(parquet(TABLE.append_column("prompt", TABLE.column("prompt")))),
        st.just(parquet(TABLE.slice(0, 0))),
        st.lists(numbers.filter(lambda n: isinstance(n, float)), min_size=2, max_size=2).map(
            lambda n: parquet(TABLE.set_column(1, "answer", pa.array(n)))
        ),
    )  # fmt: skip
    fuzz(lambda content, chat, graded: read("p.parquet", content, chat, graded), cases, content, FLAG, FLAG)
