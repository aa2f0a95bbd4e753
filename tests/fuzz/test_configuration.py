"""Fuzzed configuration files, overrides and command lines."""

import json
import shutil
import sys
import types
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import strategies as st

from kat_ray.config import Config
from kat_ray.config.load import DEMO_FILES, config_yaml, load_config
from kat_ray.errors import UserError
from kat_ray.run.directory import RunDirectory
from kat_ray.termination import RULES
from tests.fuzz.harness import check, fuzz, inside, mutated, run, scalars, sizes, texts, trees

DEMO = DEMO_FILES["demo"].read_bytes()
FULL = config_yaml(load_config("demo")).encode()
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def doubled(line):
    """Forty lines, each of which stands for twice the one above."""
    return b"a0: &a0 {x: 1}\n" + b"".join(line % (i, i, i - 1, i - 1) for i in range(1, 40))


def fields_of(annotation):
    """Fields of a section, which may be one that can be left out; none of what is no section."""
    models = [m for m in (annotation, *get_args(annotation)) if hasattr(m, "model_fields")]
    return [*models[0].model_fields] if models else []


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- files ---------------------------------------------------------------------------------------------------


def check_file(content):
    with open("c.yaml", "wb") as file:
        file.write(content)
    outcome = run("config", "c.yaml")
    check(outcome)
    if outcome.code == 0:
        with open("back.yaml", "w", encoding="utf-8") as file:
            file.write(outcome.out)
        assert load_config("back.yaml") == load_config("c.yaml"), "what is printed loads back equal"


@sizes(270)
def test_mutated_files(cases):
    fuzz(check_file, cases, st.one_of(mutated(DEMO), mutated(FULL)))


def section(name):
    annotation = Config.model_fields[name].annotation
    names = ["rule", "window", "eta", "n"] if name == "termination" else fields_of(annotation)
    return st.dictionaries(st.one_of(st.sampled_from(names), texts), st.one_of(scalars, trees), max_size=4)


REQUIRED = ("student", "teacher", "data")
sections = st.fixed_dictionaries(
    {n: st.fixed_dictionaries({"path": st.just("x")}) for n in REQUIRED},
    optional={n: st.one_of(section(n), trees) for n in Config.model_fields if n not in REQUIRED},
)


def as_yaml(tree):
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


@sizes(270)
def test_random_trees(cases):
    fuzz(check_file, cases, st.one_of(trees.map(as_yaml), sections.map(as_yaml)))


def rule_tree(rule):
    names = fields_of(RULES[rule].settings)
    values = st.dictionaries(st.sampled_from(names), scalars, max_size=3)
    return values.map(lambda v: {"student": {"path": "a"}, "teacher": {"path": "b"}, "data": {"path": "c"},
                                 "termination": {**v, "rule": rule}})  # fmt: skip


@sizes(80)
def test_rules(cases):
    fuzz(check_file, cases, st.sampled_from([*RULES]).flatmap(rule_tree).map(as_yaml))


@pytest.mark.parametrize(
    "content",
    [
        DEMO.replace(b"path: demo:student", b"path: *i") .join([BOMB.encode(), b""]),
        BOMB.encode(), DEMO + BOMB.encode(), b"run: " + BOMB.replace("\n", "\n  ").encode(),
        b"[" * 100_000, b"{a: " * 100_000, b"- " * 100_000, b"run: {steps: " + b"9" * 100_000 + b"}",
        doubled(b"a%d: &a%d {x: *a%d, y: *a%d}\n"),
        b"student: &a\n  path: *a\n", b"a: &a {<<: *a}\n", b"\xff\xfe\x00", b"\x00", b"\t- a\n\t\t- b", b"",
        doubled(b"a%d: &a%d {<<: [*a%d, *a%d]}\n"),
    ],
)  # fmt: skip
def test_files_made_to_hurt(content):
    check_file(content)


# What the operating system can hand over: no NUL, and of surrogates those that stand for bytes that are not UTF-8.
def as_argument(text):
    return "".join(c for c in text if c != "\0" and not "\ud800" <= c < "\udc80" and not "\udcff" < c <= "\udfff")


# --- overrides -----------------------------------------------------------------------------------------------

KNOWN = [
    f"{name}.{field}"
    for name, section_ in Config.model_fields.items()
    for field in fields_of(RULES["kat"].settings if name == "termination" else section_.annotation)
]
dotted = st.one_of(
    st.sampled_from(KNOWN),
    st.lists(st.one_of(texts, st.sampled_from([*Config.model_fields])), min_size=1, max_size=4).map(".".join),
)
torn = mutated(b"[1, {a: b}, 'c', &x [*x]]").map(lambda content: content.decode("utf-8", "replace"))
values = st.one_of(trees.map(json.dumps), texts, torn)
overrides = st.one_of(st.tuples(dotted, st.sampled_from(["=", "", "=="]), values).map("".join), texts)


@sizes(230)
def test_overrides(cases):
    def one(given):
        check(run("config", "demo", "--", *given))

    fuzz(one, cases, st.lists(overrides.map(as_argument), min_size=1, max_size=3))


# --- command lines -------------------------------------------------------------------------------------------

COMMANDS = (
    "train", "eval", "doctor", "compare", "replay", "report", "config", "submit", "status", "logs", "stop", "list",
)  # fmt: skip
WORDS = (
    *COMMANDS, "demo", "--config", "--json", "--runs", "--rules", "--seeds", "--out", "--rule", "--budget",
    "--rollouts", "--gradients", "--docs", "--profile", "-v", "--help", "--version", "kat", "none", "kat:eta=0.5",
    "length_matched", "length_matched:of=kat", "fixed_prefix:n=5",
    "--address", "--cluster", "--working-dir", "--no-wait",
    "--follow", "0", "1", "-1", "0.5", "1e9", "nan",
    "run.steps=3", "evaluation.data=null",
    "eta=[0.1,0.2]", "window=3", "nowhere", ".", "/", "--", "-", "", "=", "demo:student",
    "a=b=c", "--runs=.", "@file", "x" * 5000, "🙂", "\udcff", "a\nb",
)  # fmt: skip
argv = st.lists(st.one_of(st.sampled_from(WORDS), texts.map(as_argument)), max_size=7)
commands = st.tuples(st.sampled_from(COMMANDS), argv).map(lambda c: [c[0], *c[1]])


@sizes(230)
def test_command_lines(cases, monkeypatch):
    def refuse(config, model):
        raise UserError("as if no cluster could be had")

    stand_in = types.ModuleType("actors.driver.train")
    stand_in.train, stand_in.evaluate_model = (lambda config, resume=None: None), refuse
    monkeypatch.setitem(sys.modules, "actors.driver.train", stand_in)
    monkeypatch.setattr("kat_ray.cli.doctor.examine", lambda config: iter(()))

    def no_cluster(*_):
        raise UserError("as if nobody answered there")

    monkeypatch.setattr("actors.ray_jobs.client.Jobs", no_cluster)

    def one(given):
        check(run(*given))

    fuzz(one, cases, st.one_of(argv, commands))


# --- a run, until everything has been read -------------------------------------------------------------------


def check_train(content):
    shutil.rmtree("runs", ignore_errors=True)
    Path("c.yaml").write_bytes(content)
    before = {p.name for p in Path().iterdir()}
    outcome = run("train", "c.yaml")
    check(outcome)
    if outcome.code == 2:
        assert {p.name for p in Path().iterdir()} == before, "a refused run leaves nothing"


@sizes(110)
def test_train_reads_everything_before_it_writes(cases, monkeypatch):
    from actors.driver import train as job

    def until_ready(config, resume):
        job.prepare(config)
        if inside(config.run.dir):
            with RunDirectory.create(config.run, config_yaml(config)) as made:
                assert load_config(made.path / "config.yaml") == config

    monkeypatch.setattr(job, "train", until_ready)
    small = DEMO.replace(b"path: demo:train", b"path: demo:train\n  limit: 20").replace(
        b"path: demo:heldout", b"path: demo:heldout\n    limit: 20"
    )
    fuzz(check_train, cases, mutated(small, most=2))
