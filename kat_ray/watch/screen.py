"""A run's view as lines of a terminal: progress, and each figure with its course."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from kat_ray.observability.drawing import LABEL, Figure, cut_to, duration, progress_bar, row
from kat_ray.watch.view import State, View

_SILENT = 10.0  # steps' time without a line, after which a run is said to be silent; 30 s at least
_COLOURS = {State.GOING: "green", State.FINISHED: "bold green", State.STOPPED: "red"}


def screen(view: View, width: int, now: float, unicode: bool = True) -> Text:
    """Lines of at most `width` columns."""
    lines: list[Text] = [_head(view, now), *_progress(view, width, now, unicode)]
    figures = list(_figures(view))
    if figures:
        lines += [Text(), *(row(figure, width, unicode) for figure in figures)]
    lines += [Text(line) for line in _totals(view)]
    if view.notes:
        lines += [Text(), *(Text(_printable(note), style="dim") for note in view.notes)]
    return cut_to(lines, width, unicode)


def _printable(text: str) -> str:
    """What moves a terminal's cursor or colours stays out of it."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _head(view: View, now: float) -> Text:
    text = Text(_printable(view.name), style="bold").append("  ")
    text.append(view.state.value, style=_COLOURS.get(view.state, "yellow"))
    pace = view.seconds_a_step()
    if view.state is State.GOING and view.written is not None:
        silent = now - view.written
        if silent > max(30.0, _SILENT * (pace or 0.0)):
            text.append(f"  no step for {duration(silent)}", style="bold red")
    return text


def _progress(view: View, width: int, now: float, unicode: bool) -> Iterator[Text]:
    if view.steps is None or view.state is State.ABSENT:
        return
    done = min(view.done, view.steps)
    count = f"step {done}/{view.steps}  {done / view.steps:.0%}"
    pace = view.seconds_a_step()
    if view.state is State.GOING and pace is not None:
        since = 0.0 if view.written is None else now - view.written
        count += f"  {pace:.1f} s a step  ETA {duration(pace * (view.steps - done) - min(since, pace))}"
    yield Text(count)
    yield progress_bar(done, view.steps, width, unicode)


def _figures(view: View) -> Iterator[Figure]:
    four, share, whole = "{:.4f}".format, "{:.1%}".format, "{:,.0f}".format
    of_teachers = [
        Figure(f"threshold {name}", view.series(f"teacher/threshold/{name}"), four)
        for name in view.names("teacher/threshold/")
    ]
    for figure in (
        Figure("KL", view.series("kl/mean"), four),
        Figure("reward", view.series("reward/mean"), "{:.3f}".format),
        Figure("accuracy", view.series("eval/avg_at_k"), share),
        Figure("trapped", view.series("rollout/trapped_share"), share),
        *(of_teachers or [Figure("threshold", view.series("kat/threshold"), four)]),
        Figure("length", view.series("rollout/mean_length"), whole),
        Figure("tokens/s", view.series("throughput/tokens_per_second"), whole),
    ):
        if figure.values:
            yield figure


def _totals(view: View) -> Iterator[str]:
    generated, kept = sum(view.series("rollout/generated_tokens")), sum(view.series("rollout/kept_tokens"))
    if generated:
        text = f"{'tokens':<{LABEL}} {generated:,.0f} generated"
        yield text + (f", {kept / generated:.1%} kept" if kept else "")
    fired = view.series("guards/fired")
    trouble = {
        "skipped": sum(view.series("learner/skipped")),
        "actors restarted": sum(view.series("pool/restarts")),
        "rollouts failed": sum(view.series("rollout/failed")),
    }
    words = [f"{count:,.0f} {what}" for what, count in trouble.items() if count]
    if fired:
        now, most = f"{fired[-1]:.0f} fired" if fired[-1] else "quiet", sum(1 for f in fired if f)
        yield f"{'guards':<{LABEL}} {now}" + (f" ({most} steps with one)" if most else "")
    if words:
        yield f"{'trouble':<{LABEL}} {', '.join(words)}"
