"""Incremental scoring against one full forward: what it costs to score rollouts while they are generated.

Ours is `TeacherScorer.score`, the KL included, called with chunks of `rollout.chunk_tokens` tokens of all rollouts.
The other side sees the finished sequences once, sorted by length, in the best of some batch sizes, and computes the
same columns with the same function.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.bench.child import alternate, pair_main, ratio, run_child
from actors.bench.figure import Figure
from actors.bench.pairs import MAX_POSITIONS, Pair, make_pair
from actors.bench.work import Rollouts, chunks_of, random_rollouts

GOAL = 1.3
_WORK = {"tiny": (256, (200, 501)), "large": (64, (200, 301))}  # rollouts, and the range of their lengths
_TURNS = {"tiny": 3, "large": 2}
_BATCHES = (1, 2, 4, 8, 16, 32)
_PROBED = 16  # sequences on which the batch sizes are compared


def figures(folder: Path, threads: int = 2) -> list[Figure]:
    """Seconds of incremental scoring over seconds of one full forward, for each pair."""
    found = []
    for name in ("tiny", "large"):
        make_pair(name, folder)
        owed = [Figure("teacher", _name(name), None, GOAL, "<=")]
        found += run_child(__name__, [folder, name, threads], threads, owed, timeout=300)
    return found


def _name(pair: str) -> str:
    return f"{pair}: seconds, incremental over one full forward"


def scorer_of(student: Path, teacher: Path, prompts: Path, threads: int, num_gpus: float = 0.0) -> Any:
    """A scorer in this process."""
    from actors.teacher.scorer import TeacherScorer
    from actors.teacher.settings import ScorerSettings
    from kat_ray.config import Config

    config = Config.model_validate(
        {
            "student": {"path": str(student), "dtype": "float32"},
            "teacher": {"path": str(teacher), "dtype": "float32"},
            "data": {"path": str(prompts)},
            "scorer": {"threads": threads, "num_gpus": num_gpus, "backend": "transformers"},
        }
    )
    return TeacherScorer("scorer:0", ScorerSettings.from_config(config, str(teacher), (1,), MAX_POSITIONS))


def measure(pair: Pair, threads: int, num_gpus: float = 0.0) -> list[Figure]:
    """The figure of one pair, in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    from kat_ray.config import RolloutConfig

    scorer = scorer_of(pair.student, pair.teacher, pair.prompts, threads, num_gpus)
    vocabulary = scorer._teacher._model.config.vocab_size
    count, lengths = _WORK[pair.name]
    rollouts = random_rollouts(count, lengths, vocabulary)
    size = RolloutConfig().chunk_tokens
    chunks = list(chunks_of(rollouts, size, vocabulary))

    def incremental() -> None:
        for chunk in chunks:
            scorer.score(chunk)

    scorer.score(next(chunks_of(rollouts, 1, vocabulary)))  # warms up
    scorer.release(range(count))
    plain = AutoModelForCausalLM.from_pretrained(pair.teacher, dtype=torch.float32).eval()
    plain.to(scorer._teacher._device)
    full, batch = _best_full(plain, scorer._teacher, rollouts, vocabulary)
    own, other = alternate([incremental, full], _TURNS[pair.name])
    tokens = sum(len(t) for _, t in rollouts)
    return [
        Figure(
            group="teacher",
            name=_name(pair.name),
            value=ratio(own.wall, other.wall),
            goal=GOAL,
            sense="<=",
            detail={
                "rollouts": count,
                "tokens": tokens,
                "threads": threads,
                "chunk_tokens": size,
                "full_batch": batch,
                "incremental_tokens_per_s": round(tokens / min(own.wall)),
                "full_tokens_per_s": round(tokens / min(other.wall)),
                "ratio_cpu": round(ratio(own.cpu, other.cpu), 3),
                **own.detail("incremental"),
                **other.detail("full"),
            },
        )
    ]


def _best_full(model: Any, teacher: Any, rollouts: Rollouts, vocabulary: int) -> tuple[Callable[[], None], int]:
    """The full forward over all sequences in the batch size that is fastest on some of them."""
    ordered = sorted(rollouts, key=lambda r: len(r[0]) + len(r[1]))
    sample = ordered[:: max(1, len(ordered) // _PROBED)]
    seconds = {}
    for batch in _BATCHES:
        run = _full(model, teacher, sample, vocabulary, batch)
        started = time.perf_counter()
        run()
        seconds[batch] = time.perf_counter() - started
    best = min(seconds, key=seconds.__getitem__)
    return _full(model, teacher, ordered, vocabulary, best), best


def _full(model: Any, teacher: Any, ordered: Rollouts, vocabulary: int, batch: int) -> Callable[[], None]:
    import numpy as np

    ids = np.concatenate([c.topk_ids() for c in chunks_of(ordered, 1 << 30, vocabulary)]).astype(np.int64)

    def run() -> None:
        row = 0
        for first in range(0, len(ordered), batch):
            row += _full_batch(model, teacher, ordered[first : first + batch], ids[row:])

    return run


def _full_batch(model: Any, teacher: Any, rollouts: Sequence[tuple[Any, Any]], ids: Any) -> int:
    """One right-padded forward and its columns; returns the rows computed."""
    import numpy as np
    import torch

    from actors.teacher.transformers_backend import logits_tokens

    lengths = [len(p) + len(t) - 1 for p, t in rollouts]
    inputs = np.zeros((len(rollouts), max(lengths)), dtype=np.int64)
    for b, (prompt, tokens) in enumerate(rollouts):
        inputs[b, : lengths[b]] = np.concatenate([prompt, tokens])[:-1]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(model.device)
    given = torch.from_numpy(inputs).to(model.device)
    with torch.inference_mode():
        hidden = model.model(input_ids=given, attention_mask=mask if len(rollouts) > 1 else None, use_cache=False)[
            0
        ]
        rows = torch.cat(
            [hidden[b, len(p) - 1 : n] for b, ((p, _), n) in enumerate(zip(rollouts, lengths, strict=True))]
        )
        step = logits_tokens(model.config.vocab_size)
        for first in range(0, len(rows), step):
            part = slice(first, min(first + step, len(rows)))
            teacher.columns(rows[part], torch.from_numpy(ids[part]))
    return len(rows)


if __name__ == "__main__":
    pair_main(measure)
