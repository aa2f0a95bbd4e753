"""A batch on disk as the learner got it, to look at what went wrong: safetensors and JSON, no pickle.

docs/numbers.md describes the two files. Only the kept tokens are in them: the learner saw no others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from kat_ray.data.accounting import traces_of
from kat_ray.data.batch import TrainingSample, collect_samples
from kat_ray.errors import UserError
from kat_ray.types.records import KeptRollout, PolicyCredit, RolloutChunk, ScoredChunk, TeacherRows

# Tensors of a dump that there are with a teacher only: its own, and those of the events it is compared at.
_OF_A_TEACHER = frozenset(
    {"d", "topk_ids", "student_topk_logprobs", "student_tail_logprobs"}
    | {f"teacher_{part}_logprobs" for part in ("topk", "tail", "stop")}
)


@dataclass(frozen=True)
class StepBatch:
    """All that a step's learner ranks were given. `chunks`, `teacher` and `scored` belong together one by one.

    Without a teacher the last two are empty.
    """

    chunks: Sequence[RolloutChunk]
    teacher: Sequence[TeacherRows]
    scored: Sequence[ScoredChunk]
    kept: Sequence[KeptRollout]
    prompt_ids: Mapping[int, str]  # by rollout id


def dump_batch(folder: Path, step: int, batch: StepBatch, report: Mapping[str, float]) -> Path:
    """Write `folder`/step-N.safetensors and step-N.json; returns the former.

    `report` holds the step's figures by name. An older dump of this step is replaced; UserError if the files cannot
    be written.
    """
    rows = collect_samples(batch.chunks, batch.teacher, batch.kept)
    # The student's columns lie in the chunks as the teacher's do in its rows, and are gathered the same way.
    own = [TeacherRows(c.topk_logprobs, c.tail_logprobs, c.sampled_logprobs) for c in batch.chunks]
    students = collect_samples(batch.chunks, own, batch.kept)
    kl, unscored = traces_of(batch.scored), np.zeros(0, dtype=np.float32)
    tensors = _tensors(rows, students, [kl.get(r.rollout_id, unscored)[: len(r.token_ids)] for r in rows])
    if not batch.scored:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in _OF_A_TEACHER}
    elif any(given.topk_ids_low is not None for given in batch.teacher):
        named = [r.topk_ids.astype(np.int32) for r in rows]
        tensors["teacher_topk_ids"] = np.concatenate(named or [np.zeros((0, 0), np.int32)])
    tensors |= _credit(rows)
    odd = sorted(n for n, v in report.items() if not math.isfinite(v))
    description = {
        "step": step,
        "report": {n: None if n in odd else v for n, v in report.items()},
        "non_finite": odd,  # fields of the report that are null for being so
        "tensors_with_non_finite_values": {
            n: int((~np.isfinite(a) & ~((n == "teacher_stop_logprobs") & np.isneginf(a))).sum())
            for n, a in tensors.items()
            if a.dtype.kind == "f" and a.size
        },
        "prompt_ids": [batch.prompt_ids[r.rollout_id] for r in rows],
    }
    path = folder / f"step-{step}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(path.with_suffix(".json"), (json.dumps(description, indent=2, allow_nan=False) + "\n").encode())
        _replace(path, save(tensors))
    except OSError as error:
        raise UserError(
            f"{path}: the batch of step {step}, whose loss or gradient was not finite, cannot be written: "
            f"{error.strerror or error}; earlier records are intact"
        ) from error
    return path


def _tensors(
    rows: Sequence[TrainingSample], students: Sequence[TrainingSample], kl: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    def join(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
        return np.ascontiguousarray(np.concatenate(parts or [np.zeros(0, dtype)]).astype(dtype))

    def half(parts: Sequence[np.ndarray]) -> np.ndarray:
        # float16 as the records hold it; wider where they are wider
        return np.ascontiguousarray(np.concatenate(parts or [np.zeros((0, 0), np.float16)]))

    def offsets(parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.cumsum([0, *map(len, parts)], dtype=np.int64)

    return {
        "rollout_ids": np.array([r.rollout_id for r in rows], dtype=np.int64),
        "prompt_offsets": offsets([r.prompt_ids for r in rows]),
        "prompt_token_ids": join([r.prompt_ids for r in rows], np.int32),
        "offsets": offsets([r.token_ids for r in rows]),
        "token_ids": join([r.token_ids for r in rows], np.int32),
        "kept": np.array([len(r.token_ids) for r in rows], dtype=np.int32),
        "weights": join([r.weights for r in rows], np.float32),
        "d": join(kl, np.float32),
        "sampled_logprobs": join([r.sampled_logprobs for r in rows], np.float32),
        "topk_ids": half([r.topk_ids.astype(np.int32) for r in students]),
        "student_topk_logprobs": half([r.teacher_topk for r in students]),
        "student_tail_logprobs": join([r.teacher_tail for r in students], np.float32),
        "teacher_topk_logprobs": half([r.teacher_topk for r in rows]),
        "teacher_tail_logprobs": join([r.teacher_tail for r in rows], np.float32),
        "teacher_stop_logprobs": join([r.teacher_stop for r in rows], np.float32),
    }


def _credit(rows: Sequence[TrainingSample]) -> dict[str, np.ndarray]:
    """What the rollouts have in the policy's loss; nothing of a step that has none."""
    credits = [r.policy or PolicyCredit(0.0, 0, 0.0) for r in rows]
    if not any(c.weight for c in credits):
        return {}
    return {
        "advantages": np.array([c.advantage for c in credits], dtype=np.float64),
        "policy_tokens": np.array([c.tokens for c in credits], dtype=np.int32),
        "policy_weights": np.array([c.weight for c in credits], dtype=np.float64),
    }


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
