"""Data types that a processor has no arithmetic for, and computes in all the same, slowly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kat_ray.config import Config

# Flags of /proc/cpuinfo under which products of a type are faster than those of float32.
_FAST = {
    "bfloat16": frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"}),
    "float16": frozenset({"avx512_fp16", "amx_fp16", "fphp", "asimdhp"}),
}


def cpu_flags(file: Path = Path("/proc/cpuinfo")) -> frozenset[str] | None:
    """What this machine's processor can do, as Linux names it; None where that cannot be read."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    found = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), None)
    return None if found is None else frozenset(found.split())


def slow_dtypes(config: Config, flags: frozenset[str] | None) -> Iterator[str]:
    """A line for each type that roles without a GPU are to compute in and this processor has no arithmetic for."""
    asked: dict[str, tuple[str, float]] = {
        "student.dtype": (config.student.dtype, config.sampler.num_gpus),
    }
    for group in (g for g in config.scorer_groups if g.engine != "http"):
        asked[f"{group.section}.dtype"] = (group.model.dtype, group.scorer.num_gpus)
    asked["learner.dtype"] = (config.learner.dtype, config.learner.num_gpus)
    for dtype, fast in _FAST.items():
        fields = [name for name, (type_, gpus) in asked.items() if type_ == dtype and not gpus]
        if fields and flags is not None and not fast & flags:
            yield (
                f"{', '.join(fields)} = {dtype} without a GPU: this processor has no arithmetic for it, and "
                "products take several times as long as in float32 (six to seven times, measured on an AMD EPYC "
                "with AVX2): use float32, at twice the memory"
            )
