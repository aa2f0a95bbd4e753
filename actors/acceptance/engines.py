"""Whole engines on a device: the teacher in pieces, a learner's steps, and all of a run's engines together."""

from __future__ import annotations

import socket
from pathlib import Path

import torch

from actors.acceptance.rows import Row
from actors.bench.pairs import Pair, make_pair
from actors.bench.work import all_kept, chunks_of, random_rollouts, teacher_rows
from kat_ray.agreement.compare import difference
from kat_ray.agreement.probes import ANSWER_TOKENS, probes
from kat_ray.config import Config
from kat_ray.models.tolerance import logprob_tolerance

_DTYPES = ("float32", "bfloat16")


def config_of(pair: Pair, dtype: str, gpu: bool, gpus: float = 1.0, batching: str = "padded") -> Config:
    """One of each role for the two models of a pair, all in one data type."""
    share = {"num_gpus": gpus if gpu else 0.0}
    return Config.model_validate(
        {
            "student": {"path": str(pair.student), "dtype": dtype},
            "teacher": {"path": str(pair.teacher), "dtype": dtype},
            "data": {"path": str(pair.prompts)},
            "rollout": {"max_tokens": 64, "top_k_logprobs": 32},
            "sampler": {**share, "gpu_memory_utilization": 0.25, "max_num_seqs": 64, "kv_cache_gib": 0.2},
            "scorer": {**share, "gpu_memory_utilization": 0.25, "backend": "transformers"},
            "learner": {**share, "dtype": dtype, "lr": 1e-4, "batching": batching},
        }
    )


def teacher(device: torch.device, folder: Path, pair_name: str) -> list[Row]:
    """Incremental scoring in ragged pieces with takeovers against one plain forward pass."""
    from actors.teacher.agreement import chunked_logprobs
    from actors.teacher.settings import ScorerSettings
    from actors.teacher.transformers_backend import TransformersTeacher

    pair, rows = make_pair(pair_name, folder), []
    for dtype in _DTYPES:
        config = config_of(pair, dtype, device.type == "cuda")
        scorer = TransformersTeacher(ScorerSettings.from_config(config, str(pair.teacher), (1,), 512))
        asked = probes([], scorer.vocabulary, 256, {"a long prompt": 200}, seed=0)
        pairs = [(p.prompt_ids, [2 + i] * ANSWER_TOKENS) for i, p in enumerate(asked)]
        found = difference(
            [p.kind for p in asked],
            chunked_logprobs(scorer, pairs, config.rollout.top_k_logprobs),
            scorer.plain_logprobs(pairs),
        )
        bound = logprob_tolerance(dtype, dtype)
        rows += [
            Row("teacher", f"{dtype}: in pieces against whole, mean", found.mean, bound.mean, "nats"),
            Row("teacher", f"{dtype}: the largest difference", found.largest, bound.max, "nats"),
        ]
    return rows


def packed(device: torch.device, folder: Path, pair_name: str) -> list[Row]:
    """`learner` with packed rows: flash attention for ragged sequences on a GPU."""
    return learner(device, folder, pair_name, "packed")


def learner(device: torch.device, folder: Path, pair_name: str, batching: str = "padded") -> list[Row]:
    """Three steps on one batch, the training path against a plain pass, and a change taken back."""
    import torch.distributed as dist

    from actors.learner.learner import Learner
    from actors.learner.settings import LearnerSettings

    pair = make_pair(pair_name, folder)
    config = config_of(pair, "bfloat16", device.type == "cuda", batching=batching)
    part = "learner" if batching == "padded" else f"learner, {batching}"
    rank = Learner(0, LearnerSettings.from_config(config, str(pair.student), (1,)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    rank.start("127.0.0.1", port)
    backend, wanted = dist.get_backend(), "nccl" if device.type == "cuda" else "gloo"
    vocabulary = rank._ready().student.vocabulary
    rollouts = random_rollouts(8, (40, 80), vocabulary)
    chunks = list(chunks_of(rollouts, 1 << 30, vocabulary))
    targets, kept = [teacher_rows(c) for c in chunks], all_kept(rollouts)
    weight = sum(k.weight for k in kept)
    pairs = [(p.tolist(), t.tolist()) for p, t in rollouts]
    found = difference(["random tokens"] * len(pairs), rank.logprobs(pairs, False), rank.logprobs(pairs, True))
    reports = [rank.train_step(chunks, targets, kept, weight, 0) for _ in range(3)]
    bound = logprob_tolerance("bfloat16", "bfloat16")
    return [
        Row(part, "backend", note=f"{backend}, expected {wanted}", failed=backend != wanted, value=1.0),
        Row(part, "training path against a plain pass, mean", found.mean, bound.mean, "nats"),
        Row(part, "the largest difference", found.largest, bound.max, "nats"),
        Row(part, "loss after two steps over the first", reports[-1].loss / reports[0].loss, 1.0),
        Row(part, "steps skipped", float(sum(r.skipped for r in reports)), 0.0),
    ]


def agreement(device: torch.device, folder: Path, pair_name: str, tensor_parallel: int = 1) -> list[Row]:
    """The self-test of a run, on engines of Ray's actors."""
    from actors.driver.train import check_agreement

    part = "agreement" if tensor_parallel == 1 else "tensor parallelism"
    rows = []
    for dtype in _DTYPES[:1] if device.type == "cpu" else _DTYPES:
        gpu = device.type == "cuda"
        config = config_of(make_pair(pair_name, folder), dtype, gpu, gpus=0.3)
        if tensor_parallel > 1:
            sampler = {
                **config.sampler.model_dump(),
                "tensor_parallel_size": tensor_parallel,
                "num_gpus": tensor_parallel,
            }
            config = Config.model_validate({**config.model_dump(), "sampler": sampler})
        for found in check_agreement(config):
            name = f"{dtype}: {found.ours}, and {found.theirs}"
            rows.append(Row(part, name, found.difference.mean, found.tolerance.mean, "nats", str(found.difference)))
    return rows
