"""Peak memory of learner and scorer as the vocabulary grows: with the weights, not with tokens x vocabulary.

Each measurement is a process of its own: the highest resident memory less that before the model was loaded. For the
smallest and the largest vocabulary it is taken with twice the tokens too. Activations grow with tokens at any
vocabulary; what twice the tokens add at the largest and not at the smallest is what grows with both. It is compared
with the logits of the added tokens, tokens x vocabulary x 4 bytes, which a loss over whole batches would hold.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path

from actors.bench.child import print_figures, run_child
from actors.bench.figure import Figure
from actors.bench.pairs import random_model
from actors.bench.work import all_kept, chunks_of, random_rollouts, teacher_rows

VOCABULARIES = (1_000, 10_000, 50_000, 150_000)
_ROLLOUTS, _LENGTH = 12, 256  # 3,072 tokens: three times as many as logits exist for at once
_GOAL = 0.05  # of tokens x vocabulary x 4 bytes


def figures(folder: Path, threads: int = 2) -> list[Figure]:
    """What grows with tokens and vocabulary together, by the logits of the added tokens; for both roles."""
    return [_figure(role, folder / "memory", threads) for role in ("learner", "scorer")]


def _figure(role: str, folder: Path, threads: int) -> Figure:
    smallest, largest = VOCABULARIES[0], VOCABULARIES[-1]
    name = f"{role}: memory that grows with tokens x vocabulary / logits of the tokens, {largest:,} ids"
    peaks: dict[tuple[int, int], float] = {}
    weights: dict[int, float] = {}
    for vocabulary, times in [*((v, 1) for v in VOCABULARIES), (smallest, 2), (largest, 2)]:
        run_child(__name__, ["make", role, vocabulary, folder, 1], threads, [], 300)
        owed = [Figure("memory", "peak", None)]
        (peak,) = run_child(__name__, ["measure", role, vocabulary, folder, times], threads, owed, 300)
        if peak.value is None:
            return Figure("memory", name, None, _GOAL, "<=", note=f"vocabulary {vocabulary:,}: {peak.note}")
        peaks[vocabulary, times] = peak.value / 1e6
        weights[vocabulary] = peak.detail["weight_bytes"] / 1e6
    added = {v: peaks[v, 2] - peaks[v, 1] for v in (smallest, largest)}
    logits = _ROLLOUTS * _LENGTH * (largest - smallest) * 4 / 1e6
    detail = {
        "tokens": _ROLLOUTS * _LENGTH,
        "peak_mb": {v: round(peaks[v, 1]) for v in VOCABULARIES},
        "peak_mb_twice_the_tokens": {v: round(peaks[v, 2]) for v in added},
        "weights_mb": {v: round(w) for v, w in weights.items()},
        "logits_of_the_tokens_mb": round(logits),
    }
    return Figure("memory", name, max(0.0, added[largest] - added[smallest]) / logits, _GOAL, "<=", detail)


def _measure(role: str, vocabulary: int, folder: Path, times: int) -> Figure:
    """Peak memory of one step or one scored chunk, bytes."""
    model = _directory(role, vocabulary, folder)
    rollouts = random_rollouts(_ROLLOUTS * times, (_LENGTH, _LENGTH + 1), vocabulary)
    (chunk,) = chunks_of(rollouts, 1 << 30, vocabulary)
    import deepspeed  # noqa: F401  (what libraries take is not the model's)
    import transformers  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if role == "learner":
        from actors.bench.learner import learner_of

        learner = learner_of(model, 2)
        learner.train_step([chunk], [teacher_rows(chunk)], all_kept(rollouts), float(chunk.tokens), 0)
        weights = sum(p.numel() * 4 for p in learner._loaded.student.network.parameters())
    else:
        from actors.bench.teacher import scorer_of

        scorer = scorer_of(model, model, model / "unused.jsonl", 2)
        scorer.score(chunk)
        weights = sum(p.numel() * 4 for p in scorer._teacher._model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Figure("memory", "peak", float(peak - before), detail={"weight_bytes": weights})


def _directory(role: str, vocabulary: int, folder: Path) -> Path:
    return folder / f"{role}-{vocabulary}"


def _make(role: str, vocabulary: int, folder: Path) -> None:
    target = _directory(role, vocabulary, folder)
    if not (target / "model.safetensors").is_file():
        random_model("student" if role == "learner" else "teacher", vocabulary).save_pretrained(target)


def main() -> None:
    """`python -m actors.bench.memory make|measure ROLE VOCABULARY FOLDER TIMES`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("make", "measure"))
    parser.add_argument("role", choices=("learner", "scorer"))
    parser.add_argument("vocabulary", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("times", type=int)
    a = parser.parse_args()
    if a.action == "make":
        _make(a.role, a.vocabulary, a.folder)
        print_figures([])
    else:
        print_figures([_measure(a.role, a.vocabulary, a.folder, a.times)])


if __name__ == "__main__":
    main()
