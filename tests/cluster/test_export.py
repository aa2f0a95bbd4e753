"""An exported model in the real vLLM: the log-probabilities that transformers computes of the checkpoint."""

import json

import numpy as np
import pytest
import torch

from kat_ray.cli import main as cli
from kat_ray.models.load import plain_logprobs
from tests.support.chunks import random_rollouts
from tests.support.exported import STEP, make_run

PAIRS = list(random_rollouts(6, vocabulary=90).values())


def plain(directory):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    return np.concatenate([plain_logprobs(model, *pair, torch.device("cpu")) for pair in PAIRS])


@pytest.mark.integration
def test_vllm_computes_what_transformers_does_of_the_checkpoint(tmp_path, monkeypatch):
    from tests.support.vllm_adapters import engine_of, given_logprobs

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    run = make_run(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 54321.0})  # no default
    assert cli.main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    assert {"rope_theta", "rope_parameters"} <= json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    wanted = plain(run / "checkpoints" / f"step-{STEP}")
    np.testing.assert_array_equal(plain(tmp_path / "out"), wanted)
    with engine_of(str(tmp_path / "out")) as engine:
        np.testing.assert_allclose(given_logprobs(engine, PAIRS), wanted, atol=1e-4)
    assert np.abs(plain(tmp_path / "student") - wanted).max() > 0.1, "the test would not see other weights"
