"""Fuzzed records of runs, through the commands that read them."""

import io
import json
import math
import shutil
from pathlib import Path

import matplotlib
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from matplotlib import pyplot

from kat_ray.config.load import DEMO_FILES, load_config, save_config
from kat_ray.records.traces import SCHEMA
from kat_ray.report import style
from kat_ray.types.records import StopReason
from tests.fuzz.harness import check, fuzz, mutated, run, scalars, sizes, trees
from tests.support.reports import STAGES, row, write_run
from tests.support.rewarded import with_rewards, written
from tests.support.scenarios import Run

SUMMARY = {
    "rollouts_started": 8, "rollouts_ended": {"eos": 8}, "prompt_tokens": 40, "generated_tokens": 90,
    "kept_tokens": 80, "scored_tokens": 90, "trained_tokens": 80, "overshoot_tokens": 3, "cut_back_tokens": 7,
    "wall_seconds": 12.5, "eval_before": {"avg_at_k": 0.25, "pass_at_k": 0.5, "mean_length": 9.0},
    "eval_after": {"avg_at_k": 0.5, "pass_at_k": 0.5, "mean_length": 9.0},
    "parameters": {"student": 1000, "teacher": 2000}, "versions": {"ray": "2"}, "git_commit": None,
}  # fmt: skip
EVALUATION = {"step": 1, "avg_at_k": 0.5, "pass_at_k": 0.5, "k": 2, "right": [2, 0], "mean_length": 9.0}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small finished run with everything that reports and comparisons read."""
    cut = dict(probe=False, stop_reason=StopReason.TRAPPED, cut=3, confirmed=8, correct=None)
    steps = [
        [row(4 * s, STAGES, step=s, would_cut=3), row(4 * s + 1, [1.0] * 12, step=s, correct=False),
         row(4 * s + 2, STAGES[:8], step=s, **cut), row(4 * s + 3, [0.5] * 9, step=s)]
        for s in range(2)
    ]  # fmt: skip
    path = write_run(tmp_path_factory.mktemp("original") / "run", steps)
    config = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(config.replace("path: demo:train", f"path: {path.parent}/p.jsonl"))
    (path.parent / "p.jsonl").write_bytes(b"\n".join(DEMO_FILES["demo:train"].read_bytes().split(b"\n")[:20]))
    metrics = [json.loads(line) | {"time/step": 1.5} for line in (path / "metrics.jsonl").read_text().splitlines()]
    (path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    books = [name for name in SUMMARY if name.endswith("_tokens")]
    lines = [
        {**EVALUATION, "step": step, **dict(zip(("k", "right"), asked, strict=True)),
         **{name: SUMMARY[name] * step // 2 for name in books}}
        for step, asked in enumerate(((2, [1, 0]), (1, [1, 0]), (2, [2, 0])))
    ]  # fmt: skip
    lines[0]["avg_at_k"] = 0.25
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "summary.json").write_text(json.dumps(SUMMARY, indent=2))
    return path


@pytest.fixture
def case(original, tmp_path, monkeypatch):
    """Makes a fresh copy of the run, and takes the pictures' cost out of the cases."""
    monkeypatch.chdir(tmp_path)
    twin = tmp_path / "twin"
    shutil.copytree(original, twin)
    save_config(load_config(twin / "config.yaml", ["termination.rule=none", "run.name=twin"]), twin / "config.yaml")
    for name, value in (("figure.dpi", 20), ("figure.constrained_layout.use", False)):
        monkeypatch.setitem(matplotlib.rcParams, name, value)

    drawn = iter(range(10**6))
    draw = style.save

    def save(fig, path):  # a report's ten pictures are most of its cost: one in seven is drawn
        draw(fig, path) if next(drawn) % 7 == 0 else pyplot.close(fig)

    monkeypatch.setattr(style, "save", save)

    def fresh():
        shutil.rmtree("run", ignore_errors=True)
        shutil.rmtree("out", ignore_errors=True)
        shutil.copytree(original, "run")
        return Path("run")

    return fresh


COMMANDS = {
    "replay": ("replay", "run", "--out", "out", "eta=[0.3,0.5]"),
    "replay-rule": ("replay", "run", "--out", "out", "--rule", "repetition"),
    "report": ("report", "run", "--out", "out"),
    "compare": ("compare", "--runs", "run", "twin", "--out", "out"),
}


def look(command):
    outcome = run(*COMMANDS[command])
    check(outcome)
    left = sorted(p.name for p in Path("out").rglob("*")) if Path("out").exists() else []
    if outcome.code == 2:
        assert not left, f"an error left {left}"
    else:
        assert left


@pytest.mark.parametrize("command", COMMANDS)
def test_the_unharmed_run_is_read(case, command):
    case()
    outcome = run(*COMMANDS[command])
    assert outcome.code == 0, outcome
    assert command != "compare" or Path("out/compare-curves.csv").exists(), "its evaluations make no curve"


FILES = ("metrics.jsonl", "evaluations.jsonl", "summary.json", "config.yaml")


def replaced(content, edits):
    """JSON (or JSON lines) with values at drawn places replaced."""
    parts = content.splitlines() if b"\n{" in content else [content]
    documents = [json.loads(part) for part in parts]
    for where, value in edits:
        target = documents[int(where * len(documents))]
        while True:
            keys = list(target)
            key = keys[int(where * 7919 * len(keys)) % len(keys)]
            if isinstance(target[key], dict) and target[key] and value is not None:
                target = target[key]
                continue
            target[key] = value
            break
    return "".join(json.dumps(d) + "\n" for d in documents).encode("utf-8", "surrogatepass")


@sizes(70)
def test_records_in_text(case, cases, original):
    contents = {name: (original / name).read_bytes() for name in FILES}
    values = st.one_of(scalars, trees)
    structured = st.tuples(
        st.sampled_from(FILES[:3]), st.lists(st.tuples(st.floats(0, 0.999), values), min_size=1, max_size=2)
    ).map(lambda drawn: (drawn[0], replaced(contents[drawn[0]], drawn[1])))
    bytewise = st.sampled_from(FILES).flatmap(lambda n: st.tuples(st.just(n), mutated(contents[n])))

    def one(command, drawn):
        (case() / drawn[0]).write_bytes(drawn[1])
        look(command)

    fuzz(one, cases, st.sampled_from(["report", "compare"]), st.one_of(structured, bytewise))


ints = st.one_of(st.none(), st.sampled_from([0, -1, 1, 3, 7, 2**31 - 1, -(2**31)]))
floats = st.one_of(st.none(), st.floats(width=32))
flags = st.sampled_from([None, True, False])
CELLS = {
    **dict.fromkeys(("step", "policy_version", "cut", "confirmed", "would_cut"), ints),
    **dict.fromkeys(("threshold", "minimum"), st.one_of(st.none(), st.floats())),
    **dict.fromkeys(("probe", "correct"), flags),
    **dict.fromkeys(("token_ids", "teacher_top"), st.one_of(st.none(), st.lists(ints, max_size=5))),
    **dict.fromkeys(("prompt_id", "stop_reason"), st.one_of(st.none(), st.text(max_size=5))),
    "rollout_id": st.one_of(ints, st.just(2**62)),
    "d": st.one_of(st.none(), st.lists(floats, max_size=14)),
    "weights": st.one_of(st.none(), st.lists(st.sampled_from([None, 0.0, 1.0, math.nan]), max_size=5)),
    "overlap": st.one_of(st.none(), st.lists(st.sampled_from([None, 0.5]), max_size=12)),
}


def with_cell(table, column, index, value):
    values = table.column(column).to_pylist()
    values[index] = value
    kind = pa.list_(pa.float32()) if column in ("weights", "overlap") else SCHEMA.field(column).type
    return table.set_column(table.column_names.index(column), column, pa.array(values, kind))


def with_column(table, column, kind):
    at = table.column_names.index(column)
    if kind == "drop":
        return table.remove_column(at)
    if kind == "twice":
        return table.append_column(column, table.column(column))
    value = {"text": "x", "list": [[1]], "number": 1.5, "time": None, "struct": {"a": 1}}[kind]
    return table.set_column(at, column, pa.array([value] * len(table)))


def parquet(table):
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@sizes(70)
def test_traces(case, cases, original):
    file = "traces/step-000001.parquet"
    content = (original / file).read_bytes()
    table = pq.read_table(original / file)
    cells = st.sampled_from([*CELLS]).flatmap(
        lambda c: st.tuples(st.just(c), st.integers(0, len(table) - 1), CELLS[c])
    )
    kinds = ["drop", "twice", "text", "list", "number", "time", "struct"]
    columns = st.tuples(st.sampled_from(SCHEMA.names), st.sampled_from(kinds))
    drawn = st.one_of(
        cells.map(lambda c: parquet(with_cell(table, *c))),
        columns.map(lambda c: parquet(with_column(table, *c))),
        mutated(content),
    )

    def one(command, content, footer, all_files):
        path = case()
        names = [file, "traces/step-000000.parquet"] if all_files else [file]
        for name in names:
            (path / name).write_bytes(content)
            if footer:
                (path / "traces/_footers" / Path(name).name).write_bytes(content[-len(content) // 2 :])
        look(command)

    fuzz(one, cases, st.sampled_from(["replay", "replay-rule", "report"]), drawn, st.booleans(), st.booleans())


REWARDS = {
    **dict.fromkeys(
        ("reward", "reward_weight", "advantage", "policy_weight", "probe_share"), st.floats() | st.none()
    ),
    "rewards": st.one_of(st.none(), st.lists(st.tuples(st.text(max_size=3), st.floats() | st.none()), max_size=2)),
    "reward_error": st.none() | st.text(max_size=5),
    "policy_tokens": ints,
    "sampled_logprobs": st.none() | st.lists(floats, max_size=5),
}


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory):
    run = Run(0, with_rewards(cut_reward="probe_weighted", advantage="rloo", aggregate="constant"))
    assert run.go().finished
    return written(run, tmp_path_factory.mktemp("rewarded") / "run")


@sizes(60)
def test_traces_with_rewards(cases, rewarded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = "traces/step-000001.parquet"
    table = pq.read_table(rewarded / file)
    cells = {name: value for name, value in CELLS.items() if name in SCHEMA.names} | REWARDS

    def one(changes, command):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(rewarded, "run")
        harmed = table
        for column, index, value in changes:
            harmed = with_cell(harmed, column, index, value)
        (Path("run") / file).write_bytes(parquet(harmed))
        outcome = run(*command)
        check(outcome)

    one_cell = st.sampled_from([*cells]).flatmap(
        lambda c: st.tuples(st.just(c), st.integers(0, len(table) - 1), cells[c])
    )
    settings = st.sampled_from([(), ("advantage=[grpo,reinforce_pp]",), ("cut_reward=[failure,exclude]",)])
    commands = settings.map(lambda s: ("replay", "run", "--objective", *s))
    fuzz(one, cases, st.lists(one_cell, min_size=1, max_size=2), commands)
