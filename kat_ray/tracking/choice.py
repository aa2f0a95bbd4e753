"""Which trackers a run has, and whether they can be had here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from kat_ray.config import TrackerName, TrackingConfig
from kat_ray.errors import UserError
from kat_ray.observability.trackers import Trackers
from kat_ray.tracking.tracker import Ending, ServiceTracker

_BACKLOG_SECONDS = 3600.0  # for a whole run, over a slow network
# Where an online tracker is, for those that have no address of their own; one of the variables has to be set.
_ADDRESSES = {"mlflow": ("MLFLOW_TRACKING_URI",), "trackio": ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")}


def check_trackers(
    tracking: TrackingConfig, names: Sequence[TrackerName], environment: Mapping[str, str] | None = None
) -> None:
    """`UserError` for a package that is not installed, or an address that is not given."""
    there = os.environ if environment is None else environment
    for name in names:
        if not _is_installed(name):
            raise UserError(
                f"tracking.to: {name} is not installed: pip install 'kat-ray[{name}]', or leave {name} out"
            )
        wanted = _ADDRESSES.get(name, ())
        if tracking.online and wanted and not any(there.get(variable) for variable in wanted):
            raise UserError(
                f"tracking.online = true: {name} needs an address in the environment: {' or '.join(wanted)}; or "
                "tracking.online = false"
            )


def _is_installed(name: str) -> bool:
    """A folder of this name beside the user's files, such as the one that wandb makes, is no package."""
    found = find_spec(name)
    return found is not None and found.origin is not None


def service_trackers(
    tracking: TrackingConfig,
    names: Sequence[TrackerName],
    run: Path,
    say: Callable[[str], None],
    seconds: float | None = None,
) -> list[ServiceTracker]:
    """Those that are packages of their own.

    `say` takes a line for the user: where the run can be seen. `seconds` is what they have at the end together.
    """
    ending = Ending(seconds)
    order = {"run": str(run.resolve()), "project": tracking.project, "online": tracking.online}
    return [ServiceTracker(name, order, ending, say) for name in names if name != "tensorboard"]


def tell_again(
    run: Path, tracking: TrackingConfig, names: Sequence[TrackerName], say: Callable[[str], None]
) -> bool:
    """Tell trackers what a run has recorded and they lack; whether all of them took it."""
    with Trackers(service_trackers(tracking, names, run, say, _BACKLOG_SECONDS)) as trackers:
        trackers.start(0)
    return not trackers.has_failed
