"""trackio: a local SQLite file in RUN/tracking/trackio, or a Space or server named by the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from kat_ray.observability.redact import redact
from kat_ray.tracking.service import Service, Shown

PLACES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # of which online needs one


class TrackioService(Service):
    """Rows of (step, values). Runs are known by name, so the run's name there is its id."""

    def open(self, shown: Shown) -> str:
        """Offline, the environment's Space and server are not looked at."""
        if not shown.online:
            for name in PLACES:
                os.environ.pop(name, None)
            os.environ["TRACKIO_DIR"] = str(shown.folder / "trackio")
        import trackio  # reads TRACKIO_DIR when it is imported

        self._markdown = trackio.Markdown
        self._step = 0
        self._run = trackio.init(
            shown.project, name=shown.id, group=shown.name, config=dict(shown.config), resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        there = next((os.environ[name] for name in PLACES if name in os.environ), None)
        self.place = redact(there or "")
        return there or f"TRACKIO_DIR={shown.folder / 'trackio'} trackio show --project {shown.project}"

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """A row has the time at which it is told: trackio takes no other."""
        self._step = max(self._step, step)
        self._run.log(dict(values), step=step)

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """The summary is a note at the last step; trackio has no place of its own for it."""
        if summary is not None:
            text = json.dumps(dict(summary), indent=2)
            self._run.log({"summary": self._markdown(f"```json\n{text}\n```")}, step=self._step)
        self._run.finish()
