"""A teacher that a stock vLLM server has, a real one on loopback: values, refusals, and runs."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from actors.driver.train import train
from actors.teacher.agreement import chunked_logprobs
from actors.teacher.scorer import make_teacher
from actors.teacher.settings import ScorerSettings
from actors.teacher.transformers_backend import TransformersTeacher
from actors.teacher.vllm_server import VllmServerTeacher
from kat_ray.analysis.replay import load_traces
from kat_ray.config.load import DEMO_FILES, load_config
from kat_ray.errors import ModelError, StateLost, UserError
from kat_ray.models.inspect import check_models, resolve_model
from kat_ray.models.load import load_causal_lm
from kat_ray.run.resume import resumed_config
from tests.cluster.disturb import AtSteps, kill_named, named
from tests.support.chunks import chunk_of, random_rollouts
from tests.support.runs import everything
from tests.support.teacher_server import VLLM_ENVIRONMENT, free_port, server_process, vllm_server

# vLLM's server takes most of a minute to start on two cores.
pytestmark = pytest.mark.nightly
SECRET = "hush-hush-5309"


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(SECRET)
    return file


@pytest.fixture(scope="module")
def url(tmp_path_factory, token):
    """A server of the embedded teacher as vLLM starts it, behind a token; its own top k has up to 64 ids."""
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    more = ("--enable-prompt-tokens-details", "--block-size", "32", "--max-logprobs", "64")
    command = vllm_server(port, DEMO_FILES["demo:teacher"], *more)
    address = f"http://127.0.0.1:{port}"
    with server_process(command, address, log, **VLLM_ENVIRONMENT, VLLM_API_KEY=SECRET):
        yield Address(address, token)


class Address(NamedTuple):
    url: str
    token: Path


def config_of(url, *more):
    return load_config(
        "demo", ["teacher.type=http", f"teacher.url={url.url}", f"teacher.http.token_file={url.token}", *more]
    )


def settings_of(config, stop_ids=(1, 5)):
    return ScorerSettings.from_config(config, resolve_model(config.teacher), stop_ids, 200, 166)


@pytest.fixture(scope="module")
def student():
    config = load_config("demo")
    return load_causal_lm(config.student, resolve_model(config.student), "float32", "student")


def test_columns_are_those_of_a_local_teacher(url, student):
    """Exact at the student's ids, the stop ids and the rest; what is sent again is found in the prefix cache."""
    remote = make_teacher(settings_of(config_of(url)))
    local = TransformersTeacher(settings_of(load_config("demo")))
    assert isinstance(remote, VllmServerTeacher) and remote.vocabulary == local.vocabulary == 166
    rng = np.random.default_rng(0)
    rollouts = {i: (rng.integers(2, 160, 40 + i).tolist(), rng.integers(2, 160, 48).tolist()) for i in range(4)}
    sent = 0
    for start in range(0, 48, 16):
        a, b = dict.fromkeys(rollouts, start), dict.fromkeys(rollouts, start + 16)
        chunk = chunk_of(student, rollouts, start=a, end=b, top_k=48)
        ours, theirs = (t.score(chunk, chunk.topk_ids()) for t in (remote, local))
        np.testing.assert_allclose(ours.topk, theirs.topk, atol=1e-4)
        np.testing.assert_allclose(ours.tail.exp(), theirs.tail.exp(), atol=1e-5)
        np.testing.assert_allclose(ours.stop.exp(), theirs.stop.exp(), atol=1e-5)
        sent += sum(len(p) + start + j for p, _ in rollouts.values() for j in range(16))
    assert 4 * 88 < remote.run_tokens < 0.5 * sent, (remote.run_tokens, sent, local.run_tokens)
    remote.release(list(rollouts))
    with pytest.raises(StateLost, match=r"\[0, 1, 2, 3\] is not held"):
        remote.score(chunk, chunk.topk_ids())


def test_its_own_top_k_is_that_of_a_local_teacher(url, student):
    """And the masses beside it; where two ids are about as likely, either may be among them."""
    remote = make_teacher(settings_of(config_of(url)))
    local = TransformersTeacher(settings_of(load_config("demo")))
    rollouts = random_rollouts(4, vocabulary=160, tokens=(20, 40))
    for start in (0, 16):
        live = {i: r for i, r in rollouts.items() if len(r[1]) > start}
        end = {i: min(start + 16, len(tokens)) for i, (_, tokens) in live.items()}
        chunk = chunk_of(student, live, start=dict.fromkeys(live, start), end=end, top_k=48)
        ours, theirs = (t.score(chunk, chunk.topk_ids(), 48) for t in (remote, local))
        np.testing.assert_allclose(ours.topk, theirs.topk, atol=1e-4)
        ours, theirs = ours.targets, theirs.targets
        np.testing.assert_allclose(ours.topk, theirs.topk, atol=1e-4)
        np.testing.assert_allclose(ours.tail.exp(), theirs.tail.exp(), atol=1e-5)
        np.testing.assert_allclose(ours.stop.exp(), theirs.stop.exp(), atol=1e-5)
        assert (ours.ids == theirs.ids).float().mean() > 0.99


def test_pieces_are_the_servers_own_plain_passes(url):
    remote = make_teacher(settings_of(config_of(url)))
    pairs = [(prompt, tokens) for prompt, tokens in random_rollouts(4, vocabulary=160).values()]
    for own, plain in zip(chunked_logprobs(remote, pairs, 48), remote.plain_logprobs(pairs), strict=True):
        np.testing.assert_allclose(own, plain, atol=1e-4)
    assert remote.held == 0


def test_the_server_is_checked_before_a_run(url, tmp_path):
    facts = check_models(config_of(url))
    assert facts.teachers["teacher"].max_length == 255 and not facts.warnings
    for overrides, words in (
        (["termination.rule=prune_opd"], "termination.rule = 'prune_opd': it needs overlap of every token"),
        (["rollout.top_k_logprobs=140"], "rollout.top_k_logprobs = 140: must be <= 127"),
        (["objective.opd.teacher_temperature=2"], "objective.opd.teacher_temperature = 2: "),
        (["objective.opd.support=teacher", "rollout.top_k_logprobs=65"], "start the server with --max-logprobs 65"),
        (["numerics.fp32_output_layer=true"], "a vLLM server does not say whether its own is"),
        (
            ["teacher.http.model=other"],
            "teacher.http.model = 'other': the server has no such model; it has teacher",
        ),
        (["teacher.http.token_file=null"], "the server wants a token (401)"),
    ):
        with pytest.raises(UserError) as refused:
            check_models(config_of(url, *overrides))
        assert words in str(refused.value)
    (tmp_path / "token").write_text("another-one")
    with pytest.raises(UserError, match=r"the server refuses the token \(401\)"):
        check_models(config_of(url, f"teacher.http.token_file={tmp_path}/token"))


def test_a_server_of_another_tokenizer_is_refused(url, tmp_path):
    """Both models that the configuration names have one tokenizer, the server's model another."""
    for name in ("student", "teacher"):
        folder = tmp_path / name
        folder.mkdir()
        for file in DEMO_FILES[f"demo:{name}"].iterdir():
            text = file.read_bytes()
            if file.name == "tokenizer.json":
                tree = json.loads(text)
                words = tree["model"]["vocab"]
                words["take"], words["double"] = words["double"], words["take"]
                text = json.dumps(tree).encode()
            (folder / file.name).write_bytes(text)
    config = config_of(url, f"student.path={tmp_path}/student", f"teacher.path={tmp_path}/teacher")
    with pytest.raises(ModelError, match=r"teacher\.url = .*: the server's (tokenizer|vocabulary)"):
        check_models(config)


def run_of(folder, name, *more):
    """What runs of the embedded task have in common."""
    return [
        f"run.dir={folder}", f"run.name={name}", "run.deterministic=true", "run.tensorboard=false",
        "rollout.prompts_per_step=6", "rollout.max_tokens=40", "evaluation.data=null", "sampler.num_cpus=0.5",
        "scorer.num_cpus=0.5", "learner.num_cpus=0.5", "learner.threads=1", *more,
    ]  # fmt: skip


def steps_of(run):
    return [m for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "learner/loss" in m]


@pytest.mark.usefixtures("ray_local")
def test_a_run(url, tmp_path):
    """Two steps with the check of all engines before them; its first step's KL is that of a local teacher."""
    paths = [
        train(config_of(url, *run_of(tmp_path, "remote", "run.steps=2"))),
        train(load_config("demo", run_of(tmp_path, "local", "run.steps=2", "run.check_agreement=false"))),
    ]
    steps = [steps_of(p) for p in paths]
    assert [len(s) for s in steps] == [2, 2]
    assert steps[0][0]["learner/loss"] == pytest.approx(steps[1][0]["learner/loss"], rel=1e-3)
    assert steps[0][0]["scorer/run_per_token"] > 1
    assert SECRET not in (paths[0] / "config.yaml").read_text()


OWN = (
    "objective.opd.divergence=forward", "objective.opd.support=teacher", "objective.off_policy.share=0.34",
    "data.path=demo:hints", "data.completion_column=solution", "run.steps=3", "run.checkpoint_every=1",
    "run.check_agreement=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def straight(ray_local, url, tmp_path_factory):
    """A run on the teacher's own top k, and on completions of the data.

    One request at a time: the server's bits depend on what it runs together.
    """
    folder = tmp_path_factory.mktemp("runs")
    return train(config_of(url, *run_of(folder, "straight", *OWN, "teacher.http.concurrency=1")))


def test_a_run_on_its_own_top_k_is_about_that_of_a_local_teacher(straight, tmp_path):
    ours, theirs = steps_of(straight), steps_of(train(load_config("demo", run_of(tmp_path, "local", *OWN))))
    assert len(ours) == len(theirs) == 3
    assert ours[0]["learner/loss"] == pytest.approx(theirs[0]["learner/loss"], rel=1e-3)


def test_a_resumed_run_has_the_same_bits(straight, tmp_path):
    """From its last step but one on, in a copy. What the server does not report is NaN, which equals nothing."""
    copy = tmp_path / "copy"
    shutil.copytree(straight, copy)
    shutil.rmtree(copy / "checkpoints" / "step-3")
    (copy / "summary.json").unlink()
    train(resumed_config(copy, []), resume=copy)
    ours, theirs = (everything(run) for run in (copy, straight))
    assert [name for name in ours if repr(ours[name]) != repr(theirs[name])] == []


@pytest.mark.usefixtures("ray_local")
def test_the_scorer_is_killed_in_the_middle_of_a_run(url, straight, tmp_path):
    """The server held nothing of it: the next one sends all that stands before its tokens."""
    more = ("run.steps=6", "cluster.max_restarts=5")
    metrics, ended = tmp_path / "killed" / "metrics.jsonl", named("kat:scorer:0")
    with AtSteps(metrics, (2, partial(kill_named, "kat:scorer:0", ended))) as killed:
        path = train(config_of(url, *run_of(tmp_path, "killed", *OWN, *more)))
    steps = steps_of(path)
    assert killed.done and killed.done[0] < 5 and sum(m["pool/restarts"] for m in steps) >= 1
    assert len(steps) == 6 and all(np.isfinite(m["learner/loss"]) for m in steps)
    traces, others = (load_traces(p)[0] for p in (path, straight))
    end = others.offsets[int((others.step < 1).sum())]
    assert end > 0 and np.isfinite(traces.d).all()
    np.testing.assert_allclose(traces.d[:end], others.d[:end], atol=1e-4)
    assert json.loads((path / "summary.json").read_text())["rollouts_ended"]["failed"] == 0
