"""What SECURITY.md promises of the source: nothing from outside is unpickled, no YAML but plain data."""

import ast
import json
import logging
import re
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from kat_ray.cli import main as cli
from kat_ray.errors import UserError
from kat_ray.observability.redact import RedactingFormatter, redact
from kat_ray.records.json_records import METRICS, SUMMARY, read_json, read_json_lines
from kat_ray.records.traces import read_rows, write_traces
from tests.support.paths import ROOT
from tests.support.reports import STAGES, row, small_run

SOURCES = sorted(p for folder in ("kat_ray", "actors", ".ci") for p in (ROOT / folder).rglob("*.py"))
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# module or object -> what of it reads pickles or runs what it reads
CALLS = {
    "torch": {"load"}, "yaml": {"load", "load_all", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all"},
    "np": {"load", "loads"}, "numpy": {"load", "loads"}, "pd": {"read_pickle"}, "jit": {"load"},
    "serialization": {"load"},
}  # fmt: skip
LOADERS = {"Loader", "UnsafeLoader", "FullLoader", "CLoader", "CFullLoader", "CUnsafeLoader"}


def offences(source):
    """Whatever in a module's source could read a pickle, or objects from YAML."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names if a.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            root = (node.module or "").split(".")[0]
            names = {a.name for a in node.names}
            found = [node.module] if root in UNPICKLERS else sorted(names & CALLS.get(node.module or "", set()))
            found += sorted(names & LOADERS) if root == "yaml" else []
        elif isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            found = [f"{owner}.{node.attr}"] if node.attr in CALLS.get(owner, ()) else []
            found += [f"yaml.{node.attr}"] if owner == "yaml" and node.attr in LOADERS else []
        elif isinstance(node, ast.keyword):
            is_on = isinstance(node.value, ast.Constant) and node.value.value is True
            found = ["allow_pickle=True"] if node.arg == "allow_pickle" and is_on else []
            found += ["weights_only=False"] if node.arg == "weights_only" and not is_on else []
        else:
            found = []
        yield from (f"{getattr(node, 'lineno', node)}: {what}" for what in found)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled(path):
    assert not list(offences(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import cloudpickle as c", "import joblib", "torch.load(p)",
        "from torch import load", "yaml.load(t, L)", "x = yaml.FullLoader", "from yaml import Loader", "np.load(p)",
        "f(p, allow_pickle=True)", "f(weights_only=False)", "torch.jit.load(p)", "from yaml import unsafe_load",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_searches(source):
    assert list(offences(source))


def test_text_of_rollouts_prompts_and_names_is_escaped_in_the_report(tmp_path):
    nasty = "<script>alert('in')</script>"
    run = small_run(tmp_path, prompt_id=nasty)
    config = run / "config.yaml"
    (tmp_path / f"{nasty.replace('/', '_')}.jsonl").write_text(
        json.dumps({"prompt": nasty, "answer": nasty, "id": nasty})
    )
    path = json.dumps(str(tmp_path / f"{nasty.replace('/', '_')}.jsonl"))
    config.write_text(config.read_text().replace("path: demo:train", f"path: {path}"))
    assert cli.main(["report", str(run)]) == 0
    html = (run / "report" / "report.html").read_text()
    assert "alert(" in html, "the nasty text must be in the page for this to mean anything"
    assert "<script>alert" not in html
    assert len(re.findall("<script", html)) == 2, "the page's data and the page's own script"


# --- secrets -------------------------------------------------------------------------------------------------

ENVIRONMENT = {"HF_TOKEN": "hf_secretsecret", "SHORT_KEY": "abc", "TOKENIZERS_PARALLELISM": "falsefalse"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no hf_secretsecret here", "no <HF_TOKEN> here"),
        ("abc falsefalse", "abc falsefalse"),
        ("ray://me:word@host:1/x", "ray://***@host:1/x"),
        ("https://token@host/a?b=1&api_key=word&c=2", "https://***@host/a?b=1&api_key=***&c=2"),
        ("http://host/?token=word", "http://host/?token=***"),
        ("me@host and http://host/a@b", "me@host and http://host/a@b"),
    ],
)
def test_redaction(text, shown):
    assert redact(text, ENVIRONMENT) == shown


def test_logs_and_their_tracebacks_are_redacted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT["HF_TOKEN"])
    try:
        raise ValueError("refused: Bearer hf_secretsecret")
    except ValueError:
        record = logging.LogRecord(
            "kat_ray", logging.ERROR, "", 0, "hub said %s", ("hf_secretsecret",), sys.exc_info()
        )
    text = RedactingFormatter().format(record)
    assert "ValueError" in text and text.count("<HF_TOKEN>") >= 2 and "secretsecret" not in text


# --- records of strangers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cut": 99}, "cut lies outside of the rollout"),
        ({"would_cut": -1}, "would_cut lies outside of the rollout"),
        ({"token_ids": np.array([3], np.int32)}, "more tokens were scored than generated"),
        ({"token_ids": np.full(11, -1, np.int32)}, "token_ids are negative"),
        ({"rollout_id": -1}, "rollout_id is negative"),
        ({"probe": None}, "probe is missing"),
    ],
)
def test_traces_that_no_run_can_have_written_are_left_out(tmp_path, changes, words):
    write_traces(tmp_path, 0, [replace(row(0, STAGES), **changes)])
    with pytest.raises(pa.ArrowInvalid, match=f"these are no traces: {words}"):
        read_rows(tmp_path / "step-000000.parquet")


@pytest.mark.parametrize(
    "line", ["7", '{"step": "1"}', '{"kl/mean": 1}', '{"step": 1, "kl/mean": 1e400}', "[" * 9999]
)
def test_metrics_that_are_none_are_damage(tmp_path, line):
    (tmp_path / "m.jsonl").write_text('{"step": 0, "kl/mean": null, "non_finite": ["kl/mean"]}\n' + line + "\n")
    lines, notes = read_json_lines(tmp_path / "m.jsonl", METRICS)
    assert len(lines) == 1 and notes == [f"{tmp_path / 'm.jsonl'}:2 is damaged: read up to it"]


@pytest.mark.parametrize(
    "content", ['{"rollouts_started": 0}', '{"parameters": null}', '{"eval_after": {}}', "[" * 9999]
)
def test_a_summary_that_is_none_is_one_message(tmp_path, content):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        read_json(tmp_path / "s.json", SUMMARY)


# --- places --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["replay", "report"])
def test_paths_that_cannot_be_are_one_message(tmp_path, capsys, command):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "x" * 300])
    assert end.value.code == 2 and "is too long for a path" in capsys.readouterr().err
    run = small_run(tmp_path)
    (tmp_path / "file").write_text("")
    rule = ["--rule", "fixed_prefix", "n=3"] if command == "replay" else []
    assert cli.main([command, str(run), *rule, "--out", str(tmp_path / "file" / "below")]) == 2
    error = capsys.readouterr().err
    assert "cannot be written: Not a directory; choose another place" in error
    assert cli.main(["config", "~nobody-of-this-name/x.yaml"]) == 2
    assert "no such user's home directory" in capsys.readouterr().err
