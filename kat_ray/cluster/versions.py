"""Versions of the side that submits a run and of the cluster that runs it, and what to do where they differ."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata

CLIENT_VARIABLE = "KAT_RAY_CLIENT"


def versions() -> str:
    """Versions here, in one line; what is not installed (a working tree) is left out."""
    found = {"python": platform.python_version()}
    for name in ("ray", "kat-ray"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return " ".join(f"{name}={version}" for name, version in found.items())


def skew(environment: Mapping[str, str]) -> Iterator[str]:
    """Where this process's versions differ from those of the side that submitted it."""
    theirs = dict(word.split("=", 1) for word in environment.get(CLIENT_VARIABLE, "").split() if "=" in word)
    ours = dict(word.split("=", 1) for word in versions().split()) if theirs else {}
    for name, version in theirs.items():
        if ours.get(name, version) != version:
            yield (
                f"submitted from {name} {version}, this cluster has {ours[name]}, which is what runs. If it fails, "
                f"install {name} {ours[name]} where you submit, or use an image with {name} {version}"
            )


def other_ray(theirs: str, ours: str) -> str:
    """What to do about a cluster of another Ray."""
    return (
        f"the cluster runs Ray {theirs}, here is Ray {ours}: install ray=={theirs} here (or submit from the "
        f"cluster's image), or start the cluster from an image with Ray {ours} and with rayVersion {ours}"
    )
