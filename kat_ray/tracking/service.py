"""What a tracker's package has to do for a run: one subclass of `Service` for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shown:
    """The run as a tracker shows it."""

    id: str  # one for the run's whole life; also where a package wants a name that no other run has
    name: str
    project: str
    config: Mapping[str, Any]  # config.yaml
    folder: Path  # for what the package writes, absolute
    online: bool


class Service:
    """One package's client, in the tracker's own process, which ends with whatever it raises."""

    place = ""  # set by `open`, without secrets: another one has not been told anything

    def open(self, shown: Shown) -> str:
        """Begin the run, or go on with the one of this id; returns where it can be seen."""
        raise NotImplementedError

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Finite values after `step` steps, at a time in seconds since 1970; no values of a kind come twice."""
        raise NotImplementedError

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Hand over everything: with summary.json, or with None where the run may be resumed."""
        raise NotImplementedError


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree under dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def numbers(tree: Mapping[str, Any]) -> dict[str, float]:
    """The leaves that are numbers."""
    found = flat(tree).items()
    return {n: float(v) for n, v in found if isinstance(v, int | float) and not isinstance(v, bool)}
