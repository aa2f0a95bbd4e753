"""The loop of `kat-ray watch`: look, draw, wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from kat_ray.errors import UserError
from kat_ray.storage.address import Address
from kat_ray.watch.screen import screen
from kat_ray.watch.view import RunReader, State, View

SECONDS = 1.0  # between two looks
_OVER = (State.FINISHED, State.STOPPED)


def watch_run(folder: Path, console: Console, once: bool = False, seconds: float = SECONDS) -> int:
    """A run's directory. `UserError` for one that is not there, where nobody would wait for it."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a run directory, such as runs/latest")
    view = RunReader(folder).view()
    if view.state is State.ABSENT and (once or not console.is_terminal or not folder.parent.is_dir()):
        raise UserError(f"{folder}: not a run directory (no config.yaml in it); name one, such as runs/latest")
    return watch(RunReader(folder).view, console, once, seconds)


def stored_view(address: Address) -> Callable[[], View]:
    """Looks at a run in a bucket, whose records its driver uploads twice a minute; `UserError` for none there."""
    from kat_ray.run.stored_copy import WATCHED, copied, has_ended, resolved

    run = resolved(address)
    reader = RunReader(copied(run, WATCHED))

    def look() -> View:
        copied(run, WATCHED)
        view = reader.view()
        if view.state is State.ABSENT:
            raise UserError(f"{run}: no run there (no config.yaml); name one, such as {run.parent}/latest")
        ended = view.state is not State.FINISHED and has_ended(run)
        return replace(view, state=State.STOPPED) if ended else view

    return look


def watch(look: Callable[[], View], console: Console, once: bool = False, seconds: float = SECONDS) -> int:
    """Draw until the run is over, or the user leaves; one frame where there is no terminal, or `once`."""
    view = look()
    if console.is_terminal and not once and view.state not in _OVER:
        try:
            with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
                while view.state not in _OVER:
                    live.update(_frame(view, console), refresh=True)
                    time.sleep(seconds)
                    view = look()
        except KeyboardInterrupt:
            pass
    console.print(_frame(view, console), soft_wrap=True)
    return 0


def _frame(view: View, console: Console) -> Text:
    return screen(view, console.width, time.time(), console.encoding.lower().startswith("utf"))
