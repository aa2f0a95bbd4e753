"""SwanLab. Offline it writes RUN/tracking/swanlab, a folder for each process of the run, for `swanlab sync`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kat_ray.tracking.service import Service, Shown


class SwanlabService(Service):
    """Nothing of machine, code or terminal is collected, and nobody is asked anything."""

    def open(self, shown: Shown) -> str:
        """With `resume="allow"`: the same id is the same run."""
        import swanlab

        settings = swanlab.Settings(
            interactive=False,
            terminal=swanlab.Settings.Terminal(proxy_type="none"),
            probe=swanlab.Settings.Probe(
                hardware=False, runtime=False, requirements=False, conda=False, git=False, swanlab=False,
                monitor=False,
            ),
        )  # fmt: skip
        (shown.folder / "swanlab").mkdir(exist_ok=True)
        self._run = swanlab.init(
            project=shown.project, name=shown.name, id=shown.id, resume="allow",
            mode="online" if shown.online else "offline", log_dir=str(shown.folder / "swanlab"),
            config=dict(shown.config), settings=settings,
        )  # fmt: skip
        return str(self._run.url if shown.online else f"swanlab sync --id {shown.id} {self._run.dir}")

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """SwanLab ignores a second value of one step; none comes."""
        self._run.log(dict(values), step=step)

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """The summary joins the configuration: SwanLab has no place of its own for it."""
        if summary is not None:
            self._run.config.update({"summary": dict(summary)})
        self._run.finish(state="success" if summary is not None else "aborted")
