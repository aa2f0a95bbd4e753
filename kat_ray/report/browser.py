"""The rollouts that a report lets one look at, token by token: a sample. What is counted is never sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kat_ray.analysis.replay import windows_of
from kat_ray.config import Config
from kat_ray.data.prompts import load_prompts
from kat_ray.errors import UserError
from kat_ray.models.inspect import load_tokenizer
from kat_ray.report.answers import answers_of
from kat_ray.report.phases import Lens
from kat_ray.report.run_records import RunRecords
from kat_ray.types.records import IntArray, Prompt

MAX_TOKENS = 400_000  # in one page: more makes it slow to open


def choose(records: RunRecords, most: int, seed: int = 0) -> IntArray:
    """Indices of at most `most` rollouts: every kind (stop reason, verdict, part of the run) in turn, at random."""
    traces, stops = records.traces, records.per_rollout("stop_reason")
    last = max(1, int(traces.step.max(initial=0)) + 1)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in np.random.default_rng(seed).permutation(len(traces.step)).tolist():
        kind = (stops[i], int(traces.correct[i]), int(4 * traces.step[i] / last), bool(traces.probe[i]))
        groups.setdefault(kind, []).append(i)
    chosen: list[int] = []
    room = MAX_TOKENS
    queues = [groups[kind] for kind in sorted(groups)]
    while queues and len(chosen) < most:
        for queue in queues:
            i = queue.pop()
            if len(chosen) < most and traces.lengths[i] <= room:
                chosen.append(i)
                room -= int(traces.lengths[i])
        queues = [queue for queue in queues if queue]
    return np.array(sorted(chosen), dtype=np.int64)


def prompts_of(config: Config, tokenizer: Any) -> tuple[Mapping[str, Prompt], str | None]:
    """The run's prompts by id, and what kept them from being read."""
    try:
        named = config.teacher if config.data.chat_template == "teacher" else None
        teacher = None if named is None else load_tokenizer(named)
        found = load_prompts(config.data, tokenizer, None, teacher=teacher, environment=config.environment)
        return {p.prompt_id: p for p in found.prompts}, None
    except (UserError, OSError) as error:
        return {}, f"prompts are not shown: {str(error).splitlines()[0]}"


class Texts:
    """Texts of single tokens; a page holds each once, and rollouts hold indices."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._index: dict[int, int] = {}
        self.texts: list[str] = []

    def index(self, token: int) -> int:
        """Where the token's text stands in `texts`."""
        if token not in self._index:
            self._index[token] = len(self.texts)
            self.texts.append(self._decode([token]))
        return self._index[token]


def rollouts_for(
    records: RunRecords, chosen: IntArray, lens: Lens, tokenizer: Any, prompts: Mapping[str, Prompt]
) -> dict[str, Any]:
    """What the page's browser shows: `texts` and one object a rollout, small enough to embed.

    `threshold`, `cut` and `would` are the run's own; `seen_threshold` and `seen_cut` are those of the settings that
    the report looks through.
    """

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    texts = Texts(decode)
    windows = windows_of(records.traces.take(chosen), lens.rule.window)
    rows = records.table.take(chosen).to_pylist()
    # Tokens that came in after the cut (overshoot) are no part of the answer.
    kept = [tokenizer.decode(row["token_ids"][: row["cut"]], skip_special_tokens=True) for row in rows]
    answers = answers_of(kept, records.config.evaluation.verifier, records.config.reading)
    shown = []
    for index, row, z, answer in zip(chosen.tolist(), rows, windows, answers, strict=True):
        prompt = prompts.get(row["prompt_id"])
        seen_cut = int(lens.cut[index])
        shown.append(
            {
                "id": row["rollout_id"],
                "step": row["step"],
                "prompt": None if prompt is None else decode(list(prompt.token_ids)),
                "gold": None if prompt is None else prompt.answer,
                "answer": answer,
                "stop": row["stop_reason"],
                "probe": row["probe"],
                "right": row["correct"],
                "rewarded": row["reward_weight"] is not None,
                "reward": _short(row["reward"]),
                "reward_error": row["reward_error"],
                "advantage": _short(row["advantage"]),
                "cut": row["cut"],
                "confirmed": row["confirmed"],
                "would": row["would_cut"],
                "threshold": _short(row["threshold"]),
                "seen_threshold": _short(float(lens.thresholds[index])),
                "seen_cut": None if seen_cut < 0 else seen_cut,
                "mean": _short(float(np.nanmean(row["d"]))) if np.isfinite(row["d"]).any() else None,
                "tokens": [texts.index(t) for t in row["token_ids"]],
                "d": [_short(x) for x in row["d"]],
                "z": [_short(x) for x in z.tolist()],
                "weights": None if row["weights"] is None else [_short(x) for x in row["weights"]],
            }
        )
    return {"texts": texts.texts, "window": lens.rule.window, "own": lens.own, "rollouts": shown}


def _short(value: float | None) -> float | None:
    """Three digits: enough to read, a third of the page's size."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.3g}")
