"""A real model through the whole pipeline: SmolLM2-135M learns from itself what noise took from it."""

import json

import pytest

from actors.driver import train as job
from kat_ray.config import Config
from kat_ray.models.tolerance import logprob_tolerance
from tests.support.real_models import NotToBeHad, write_pair

pytestmark = pytest.mark.nightly

PROMPTS = (
    "The capital of France is", "Once upon a time, in a small village,", "Water boils at a temperature of",
    "The three primary colours are", "A healthy breakfast could be", "The first person on the moon was",
)  # fmt: skip
STEPS, NOISE = 8, 0.1


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        write_pair(folder, NOISE)
    except NotToBeHad as error:
        pytest.skip(f"SmolLM2-135M cannot be had: {error}")
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def finished(ray_local, pair, tmp_path_factory, request):
    """The learner's data type, the run's directory and its steps' metrics; everything else has its default."""
    config = Config.model_validate(
        {
            "run": {"dir": str(tmp_path_factory.mktemp("runs")), "steps": STEPS, "tensorboard": False},
            "student": {"path": str(pair / "student"), "dtype": "float32"},
            "teacher": {"path": str(pair / "teacher"), "dtype": "float32"},
            "data": {"path": str(pair / "prompts.jsonl")},
            "rollout": {"prompts_per_step": len(PROMPTS), "max_tokens": 24},
            "sampler": {"kv_cache_gib": 0.25},
            "learner": {"dtype": request.param, "lr": 3e-4, "warmup_ratio": 0.0},
        }
    )
    path = job.train(config)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return request.param, path, [line for line in lines if "learner/loss" in line]


def test_sampler_and_learner_compute_the_same_student(finished):
    dtype, _, metrics = finished
    bound = logprob_tolerance("float32", dtype)
    assert len(metrics) == STEPS
    for line in metrics:
        assert 0 < line["learner/logprob_diff_mean"] < bound.mean
        assert line["learner/logprob_diff_max"] < bound.max


def test_the_student_comes_nearer_to_its_teacher(finished):
    _, _, metrics = finished
    kl = [line["kl/mean"] for line in metrics]
    assert metrics[0]["learner/loss"] == pytest.approx(metrics[0]["kl/kept_mean"], rel=0.05)
    assert sum(kl[-3:]) < 0.9 * sum(kl[:3]), kl


def test_the_run_says_what_the_tail_hides_and_what_differs(finished):
    dtype, path, metrics = finished
    assert 0.05 < metrics[0]["learner/tail_mass"] < 0.9 and metrics[0]["learner/kl_hidden"] > 0
    assert metrics[0]["learner/top_k_for_99"] > 64
    log = (path / "run.log").read_text()
    share = 1 - metrics[0]["learner/tail_mass"]
    assert f"step 1: rollout.top_k_logprobs = 64 sees {share:.1%} of the student's mass" in log
    assert ("learner.dtype = bfloat16 differ" in log) == (dtype == "bfloat16")


def test_transformers_loads_the_checkpoint_as_it_loads_the_student(finished, pair):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, path, _ = finished
    checkpoint = path / "checkpoints" / f"step-{STEPS}"
    before, after = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (pair / "student", checkpoint))
    assert before.keys() == after.keys()
    assert max((after[n].float() - before[n].float()).abs().max() for n in before) > 1e-5
    tokenizers = [AutoTokenizer.from_pretrained(p) for p in (pair / "student", checkpoint)]
    assert tokenizers[0](PROMPTS[1]).input_ids == tokenizers[1](PROMPTS[1]).input_ids
