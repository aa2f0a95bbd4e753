"""Where a run's metrics are shown beside its own records: a section of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from kat_ray.config.cluster import Resumable, Section

LISTED = {"tracking": "to"}  # sections that may be given as a list, and the field that it stands for
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "swanlab"]


class TrackingConfig(Section):
    """Where metrics go beside the run's own records (docs/tracking.md). A list is short for `to`."""

    to: Resumable[tuple[TrackerName, ...]] = ("tensorboard",)
    """Trackers. All but TensorBoard are packages of their own: pip install 'kat-ray[wandb]'. One that fails is
    reported once and left out; the run goes on."""
    project: str = Field("kat-ray", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """The project (of MLflow: the experiment) that the run is shown in."""
    online: Resumable[bool] = False
    """Send metrics to the trackers' services while the run goes on; their addresses and accounts come from the
    environment. false: they write below RUN/tracking, without a network."""

    @model_validator(mode="before")
    @classmethod
    def _list_of_trackers(cls, tree: Any) -> Any:
        return tree if isinstance(tree, Mapping | TrackingConfig) else {LISTED["tracking"]: tree}

    @model_validator(mode="after")
    def _each_once(self) -> TrackingConfig:
        if twice := sorted({name for name in self.to if self.to.count(name) > 1}):
            raise ValueError(f"to: {', '.join(twice)} is named twice; name each tracker once")
        return self
