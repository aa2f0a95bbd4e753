"""Weights & Biases. Offline it writes RUN/tracking/wandb, a folder for each process of the run: `wandb sync`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kat_ray.tracking.service import Service, Shown

FINISH_SECONDS = 20.0  # to upload what is left; the files stay for `wandb sync`


class WandbService(Service):
    """One history row for each step; an evaluation joins the row of its step."""

    def open(self, shown: Shown) -> str:
        """With `resume="allow"`: the same id is the same run. Nothing of machine, code or terminal is collected."""
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, save_code=False,
            disable_job_creation=True, x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True,
            x_save_requirements=False, finish_timeout=FINISH_SECONDS,
        )  # fmt: skip
        self._run = wandb.init(
            project=shown.project, id=shown.id, name=shown.name, resume="allow",
            mode="online" if shown.online else "offline", dir=str(shown.folder), config=dict(shown.config),
            allow_val_change=True, settings=settings,
        )  # fmt: skip
        return str(self._run.url or f"wandb sync {shown.folder / 'wandb'}/offline-run-*")

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """A step that lies before its last one is refused by wandb; none comes."""
        self._run.log({**values, "_timestamp": seconds}, step=step)

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """An exit code other than 0 marks a run that may go on as failed until it does."""
        if summary is not None:
            self._run.summary.update({"summary": dict(summary)})
        self._run.finish(exit_code=0 if summary is not None else 1)
