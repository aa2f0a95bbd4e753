"""A picture of one cut: the KL of a rollout that its rule ended, window by window, beside what the rollout said."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from kat_ray.analysis.replay import windows_of
from kat_ray.models.inspect import load_tokenizer
from kat_ray.report.run_records import RunRecords, read_run
from kat_ray.report.style import CUT, GREY, KEPT, SCALE, WOULD, pyplot, save
from kat_ray.termination import RULES, Effect, kat_parameters

_FLOOR = 1e-5  # nats: what is less is drawn as this
_COLUMNS, _LINES = 34, 11  # of the text, on either side of the cut together
_ROOM = 1.25  # of the tokens that there are: how far the axis goes on

Decode = Callable[[Sequence[int]], str]


def example(records: RunRecords) -> int | None:
    """The cut rollout whose KL fell furthest, its index; None where the run's own KAT rule cut none."""
    rule = kat_parameters(records.config.termination)
    if rule is None or RULES[records.config.termination.rule].effect is not Effect.CUTS:
        return None
    traces = records.traces
    best: tuple[float, int | None] = (-np.inf, None)
    cuts, confirmed = records.per_rollout("cut"), records.per_rollout("confirmed")
    for index in np.flatnonzero(traces.trapped).tolist():
        values = traces.d[traces.offsets[index] : traces.offsets[index + 1]]
        if confirmed[index] is None or cuts[index] < rule.window or not np.isfinite(traces.threshold[index]):
            continue
        before, after = (part[np.isfinite(part)] for part in (values[: rule.window], values[cuts[index] :]))
        if not len(before) or not len(after):
            continue
        fall = float(before.mean() - after.mean())
        best = max(best, (fall, index), key=lambda found: found[0])
    return best[1]


def cut_picture(records: RunRecords, index: int, decode: Decode) -> Any:
    """KL of single tokens, the window mean, the threshold, the cut and its confirmation; the text at the right."""
    row = records.table.slice(index, 1).to_pylist()[0]
    cut, confirmed, tokens = row["cut"], row["confirmed"], row["token_ids"]
    rule = kat_parameters(records.config.termination)
    assert rule is not None
    traces = records.traces.take(np.array([index]))
    fig, (axes, text) = pyplot.subplots(1, 2, figsize=(10, 3.9), width_ratios=(2.6, 1))
    x, end = np.arange(len(traces.d)), len(tokens)
    window = windows_of(traces, rule.window)[0]
    axes.bar(x, np.maximum(traces.d, _FLOOR), width=1.0, color=np.where(x < cut, KEPT, CUT), alpha=0.3)
    axes.plot(
        x[rule.window - 1 :], window, color=SCALE, linewidth=1.8, label=f"mean of the last {rule.window} tokens"
    )
    axes.axhline(row["threshold"], color="black", linestyle="--", linewidth=1, label="threshold")
    axes.axvline(cut - 0.5, color=CUT, linewidth=2, label=f"cut at token {cut}, where the first low window began")
    told = f"confirmed at token {confirmed}: the engine is told to end"
    axes.axvline(confirmed + 0.5, color=WOULD, linewidth=1.2, label=told)
    right, most = int(end * _ROOM) + 1, records.config.rollout.max_tokens
    axes.axvspan(end - 0.5, right, facecolor="#f3f4f6", edgecolor="#d1d5db", hatch="///", linewidth=0)
    axes.text(
        (end + right) / 2,
        0.5,
        f"never\ngenerated\n(up to {most:,})",
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="center",
        color=GREY,
        fontsize=8,
        backgroundcolor="white",
    )
    axes.set(yscale="log", ylim=(_FLOOR, None), xlim=(-0.5, right - 0.5), xlabel="token", ylabel="reverse KL, nats")
    axes.set(title=f"A rollout of step {row['step'] + 1}, ended while it was generated")
    axes.legend(loc="lower left", fontsize=7, frameon=True, framealpha=0.9)
    _write(text, list(_parts(decode(tokens[:cut]), decode(tokens[cut:]))))
    return fig


def _parts(kept: str, cut: str) -> Iterator[tuple[str, str]]:
    """Lines of the text with their colours: of what is kept, and of what is not."""
    for title, part, colour, most in (("kept", kept, KEPT, _LINES - 3), ("cut away", cut, CUT, 3)):
        yield title, "black"
        lines = list(_lines(part))
        hidden = len(lines) - most
        if hidden > 0:
            lines = [*lines[: most - 2], "...", lines[-1]]
        yield from ((line, colour) for line in lines)
        yield "", colour


def _lines(text: str) -> Iterator[str]:
    """Wrapped; one that is repeated stands there once, with how often."""
    wrapped = (piece for line in text.split("\n") for piece in textwrap.wrap(line.strip(), _COLUMNS))
    for line, same in groupby(wrapped):
        count = len(list(same))
        yield line if count == 1 else f"{line}  (x {count})"


def _write(axes: Any, lines: Sequence[tuple[str, str]]) -> None:
    axes.axis("off")
    for number, (line, colour) in enumerate(lines):
        weight = "bold" if colour == "black" else "normal"
        # parse_math: a dollar sign is a dollar sign
        axes.text(
            0.0, 1.0 - number / (_LINES + 3), line, transform=axes.transAxes, va="top", color=colour, fontsize=8,
            family="monospace", weight=weight, parse_math=False,
        )  # fmt: skip


def main() -> None:
    """`python -m kat_ray.report.cut_figure RUN PNG [ROLLOUT_ID]`: the picture at the top of the README."""
    run, out, *chosen = sys.argv[1:]
    records = read_run(Path(run))
    tokenizer = load_tokenizer(records.config.student)
    index = records.per_rollout("rollout_id").index(int(chosen[0])) if chosen else example(records)
    if index is None:
        raise SystemExit(f"{run}: its rule cut no rollout")
    save(cut_picture(records, index, lambda ids: str(tokenizer.decode(ids))), out)


if __name__ == "__main__":
    main()
