"""A real model with sliding windows, Gemma 3 270M, in all engines of a run, past its window of 512 tokens."""

import json

import numpy as np
import pytest

from actors.driver.train import check_agreement
from actors.teacher import slot_masks
from actors.teacher.agreement import chunked_logprobs
from actors.teacher.settings import ScorerSettings
from actors.teacher.transformers_backend import TransformersTeacher
from kat_ray.agreement.compare import difference
from kat_ray.agreement.probes import ANSWER_TOKENS
from kat_ray.config import Config
from kat_ray.models.tolerance import logprob_tolerance
from tests.support.real_models import GEMMA3_270M, NotToBeHad, write_pair

pytestmark = pytest.mark.nightly

WINDOW = 512
BOUND = logprob_tolerance("float32", "float32")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3")
    try:
        write_pair(folder, 0.1, GEMMA3_270M)
    except NotToBeHad as error:
        pytest.skip(f"Gemma 3 270M cannot be had: {error}")
    prompts = ("The capital of France is", "Once upon a time, in a small village,")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return Config.model_validate(
        {
            "run": {"dir": str(folder / "runs")},
            "student": {"path": str(folder / "student"), "dtype": "float32"},
            "teacher": {"path": str(folder / "teacher"), "dtype": "float32"},
            "data": {"path": str(folder / "prompts.jsonl")},
            "rollout": {"prompts_per_step": 2, "max_tokens": WINDOW + 64},
            "sampler": {"kv_cache_gib": 0.25},
            "learner": {"dtype": "float32"},
        }
    )


def test_the_teacher_in_pieces_is_the_plain_model_past_its_window(config, monkeypatch):
    """And is not without the window, so that these tokens tell."""
    settings = ScorerSettings.from_config(config, config.teacher.path, (1,), WINDOW + 128)
    prompt = np.random.default_rng(0).integers(2, 200_000, WINDOW + 40).tolist()
    pairs = [(prompt, [5] * ANSWER_TOKENS), (prompt[:9], [7] * ANSWER_TOKENS)]
    kinds = ["past the window", "within it"]
    teacher = TransformersTeacher(settings)
    plain = teacher.plain_logprobs(pairs)
    found = difference(kinds, chunked_logprobs(teacher, pairs, 64), plain)
    assert found.mean < BOUND.mean and found.largest < BOUND.max, found
    monkeypatch.setattr(slot_masks.SlotMask, "_evaluate", lambda _, selection: slot_masks._causal(selection))
    blind = difference(kinds, chunked_logprobs(teacher, pairs, 64), plain)
    assert blind.mean > 10 * BOUND.mean, blind


def test_all_engines_compute_it_past_the_window(config, ray_local):
    found = check_agreement(config)
    assert len(found) == 8
    for one in found:
        assert one.difference.mean < BOUND.mean and one.difference.largest < BOUND.max, one
    # Three of random tokens, two of the data and one past the window, for each side but the first alone.
    assert {one.difference.tokens for one in found} == {6 * ANSWER_TOKENS, ANSWER_TOKENS}
