"""Configurations of whole runs, their records, and what must be so of every one."""

import json
from collections import Counter

from safetensors.numpy import load_file

from actors.cluster.samplers import Engines
from actors.testing.stub_engine import fast_stub_engine
from actors.testing.stub_learner import StubLearner
from actors.testing.stub_teacher import stub_teacher
from kat_ray.config import Config
from kat_ray.data.prompt_order import PromptOrder
from kat_ray.data.prompts import load_prompts
from kat_ray.models.inspect import load_tokenizer
from kat_ray.records.traces import read_traces

CHUNK, AHEAD = 4, 1
# What a test needs that does not ask for two of everything, nor for what is evaluated.
SINGLE = {
    "sampler": {"replicas": 1},
    "scorer": {"replicas": 1},
    "learner": {"world_size": 1},
    "evaluation": {"data": None},
}
# Rewards alone, with a teacher that cannot be read.
ALONE = {
    "teacher": {"path": "/no/such/teacher"},
    "objective": {"opd": {"weight": 0.0}, "rl": {"weight": 1.0, "advantage": "dr_grpo"}},
    "termination": {"rule": "none"},
}
PATIENT = {"max_restarts": 100, "hang_timeout": 10, "start_timeout": 180}
QUICK = Engines(fast_stub_engine, stub_teacher, StubLearner)  # their tokens depend on the rollout alone


def config_of(root, tmp_path, **sections):
    tree = {
        "run": {"dir": str(tmp_path), "steps": 5, "tensorboard": False},
        "student": {"path": str(root / "student"), "dtype": "float32"},
        "teacher": {"path": str(root / "teacher"), "dtype": "float32"},
        "data": {"path": str(root / "prompts.jsonl")},
        "rollout": {
            "prompts_per_step": 8, "rollouts_per_prompt": 2, "max_tokens": 48, "chunk_tokens": CHUNK,
            "max_chunks_ahead": AHEAD,
        },
        "termination": {
            "rule": "kat", "window": 8, "exempt": 4, "consecutive": 2, "eta": 0.5, "buffer": 32, "min_samples": 12,
            "min_steps": 1, "probe_share": 0.25,
        },
        "sampler": {"replicas": 2, "kv_cache_gib": 0.05, "num_cpus": 0.5, "max_num_seqs": 64},
        "scorer": {"replicas": 2, "num_cpus": 0.5},
        "learner": {"world_size": 2, "dtype": "float32", "lr": 1e-3, "num_cpus": 0.5},
        "evaluation": {
            "data": {"path": str(root / "prompts.jsonl"), "limit": 6}, "k": 2, "max_tokens": 16, "teacher": False,
        },
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = values if "rule" in values else {**tree.get(name, {}), **values}
    return Config.model_validate(tree)


def stub_config(files, tmp_path, steps, **sections):
    return config_of(
        files, tmp_path,
        **{
            "run": {"steps": steps, "checkpoint_every": 5, "deterministic": True},
            "rollout": {"top_k_logprobs": 16}, "evaluation": {"data": None}, "learner": {"world_size": 1},
            "guards": {"logprob_diff": None, "tail_mass": None},  # a stub engine's top k is no model's
            "cluster": PATIENT, **sections,
        },
    )  # fmt: skip


def records_of(path):
    """Summary, traces and step metrics of a run."""
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((path / "summary.json").read_text())
    return summary, read_traces(path).to_pylist(), [m for m in metrics if "learner/loss" in m]


def check_books(config, path):
    """Every rollout of the plan ended once, every prompt was trained once an epoch, every token is accounted
    for.
    """
    summary, traces, metrics = records_of(path)
    steps, per_step = config.run.steps, config.rollout.rollouts_per_step
    assert [m["step"] for m in metrics] == list(range(1, steps + 1))
    assert summary["rollouts_started"] == steps * per_step == sum(summary["rollouts_ended"].values())
    assert sorted(t["rollout_id"] for t in traces) == list(range(steps * per_step))
    assert summary["rollouts_ended"]["failed"] == 0
    books = {name: summary[f"{name}_tokens"] for name in ("generated", "kept", "overshoot", "cut_back", "trained")}
    assert books["generated"] == books["kept"] + books["overshoot"] + books["cut_back"]
    assert books["kept"] == books["trained"] == sum(m["learner/tokens"] for m in metrics)
    prompts = load_prompts(config.data, load_tokenizer(config.student), 10_000, graded=False).prompts
    order = PromptOrder(prompts, config.run.seed, config.data.shuffle)
    planned = Counter(p.prompt_id for p in order.take(range(steps * config.rollout.prompts_per_step)))
    trained = Counter(t["prompt_id"] for t in traces)
    assert trained == Counter({p: c * config.rollout.rollouts_per_prompt for p, c in planned.items()})
    return summary, traces, metrics


def check_alike(config, path, quiet):
    """A run that was disturbed has the records and the weights of one that was not: (configuration, directory).

    Of runs with the stub learner, whose weights are equal where it has learnt the same.
    """
    summary, traces, steps = check_books(config, path)
    expected = check_books(*quiet)
    assert summary["kept_tokens"] == expected[0]["kept_tokens"], "engines that draw by rollout draw the same again"
    for t, e in zip(traces, expected[1], strict=True):
        assert (t["rollout_id"], t["cut"], t["threshold"]) == (e["rollout_id"], e["cut"], e["threshold"])
        assert t["token_ids"][: t["cut"]] == e["token_ids"][: e["cut"]]
    assert [m["learner/loss"] for m in steps] == [m["learner/loss"] for m in expected[2]]
    weights, others = (load_file(last_checkpoint(p, config) / "model.safetensors") for p in (path, quiet[1]))
    assert weights["sum"].any() and weights["sum"].tolist() == others["sum"].tolist()
    return steps


def last_checkpoint(path, config):
    return path / "checkpoints" / f"step-{config.run.steps}"


def timeless(line):
    """A line of metrics.jsonl without what is measured by the clock, or of requests, which bear their numbers."""
    clocked = ("time", "throughput", "store", "learner/seconds", "transfer/http")
    return {k: v for k, v in line.items() if not k.startswith(clocked)}


def everything(run, model="model.safetensors"):
    """What must not depend on how often a run was interrupted; `model` is the file with what was learnt."""
    summary = json.loads((run / "summary.json").read_text())
    last = run / "checkpoints" / f"step-{summary['steps']}"
    names = [
        model,
        *(f"training/{p.name}" for p in sorted((last / "training").glob("*.safetensors"))),
    ]
    assert len(names) >= 2, "the optimiser beside the model, and an average where there is one"
    state = json.loads((last / "training" / "state.json").read_text())
    evaluations = run / "evaluations.jsonl"  # of a run without held-out problems there is none
    return {
        "weights": {n: (last / n).read_bytes() for n in names},
        "metrics": [timeless(json.loads(x)) for x in (run / "metrics.jsonl").read_text().splitlines()],
        "evaluations": evaluations.read_text() if evaluations.exists() else "",
        "traces": read_traces(run).to_pylist(),
        "summary": {k: v for k, v in summary.items() if k not in ("wall_seconds", "git_commit")},
        "state": {k: v for k, v in state.items() if k not in ("seconds", "positions")},
    }
