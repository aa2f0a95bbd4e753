"""The teacher as transformers loads it, beside an engine that holds another copy: to compare the two once."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from actors.teacher.backend import Sequences
from actors.teacher.settings import ScorerSettings
from kat_ray.cluster.machine import free_memory
from kat_ray.models.load import load_causal_lm, plain_logprobs
from kat_ray.types.records import FloatArray

_SHARE = 0.7  # of the free memory that a copy may take


def weights_bytes(directory: str, revision: str | None) -> int:
    """Size of a model's weight files: of a directory, or of a hub model's that were downloaded."""
    folder = Path(directory)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(directory, revision=revision, local_files_only=True))
    files = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")]
    return sum(p.stat().st_size for p in files)


def logprobs_of_copy(settings: ScorerSettings, sequences: Sequences) -> list[FloatArray] | None:
    """Log-probabilities [tokens] of answers by a copy on the CPU, on all its cores; None where it does not fit."""
    teacher = settings.teacher
    if weights_bytes(settings.teacher_dir, teacher.revision) > _SHARE * free_memory():
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        model = load_causal_lm(teacher, settings.teacher_dir, teacher.dtype, settings.section)
        return [plain_logprobs(model, *pair, torch.device("cpu"), settings.fp32_output) for pair in sequences]
    finally:
        torch.set_num_threads(threads)
