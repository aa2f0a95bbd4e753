"""A configuration file that extends another: `extends: base.yaml`, relative to its own folder.

What the file says stands before what its base says, field by field; where each value came from is kept, for
messages. Left out: several bases of one file, and a way to take a name out of a base's mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kat_ray.config.tracking import LISTED
from kat_ray.errors import ConfigError

EXTENDS = "extends"
Path_ = tuple[str | int, ...]


@dataclass
class Source:
    """Where each value came from: for messages."""

    name: str
    lines: dict[Path_, int] = field(default_factory=dict)
    overrides: dict[Path_, str] = field(default_factory=dict)
    base: Source | None = None

    def of(self, path: Path_) -> str:
        """`file:line: ` or `override ...: ` of the nearest known ancestor."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.overrides:
                return f"override {self.overrides[path[:length]]}: "
            file: Source | None = self
            while file is not None:
                if path[:length] in file.lines:
                    return f"{file.name}:{file.lines[path[:length]]}: "
                file = file.base
        return f"{self.name}: "


@dataclass(frozen=True)
class Layer:
    """One file as it was read."""

    file: Path
    tree: dict[str, Any]
    source: Source


def layers(top: Layer, find: Callable[[str, Path], Path], read: Callable[[Path, str], Layer]) -> list[Layer]:
    """The file and all that it extends, itself first; their sources are chained, and `extends` is in no tree.

    `find` makes a path of what a file in the given folder names, `read` a layer of a path and its name in messages.
    """
    found = [top]
    while (named := found[-1].tree.pop(EXTENDS, None)) is not None:
        above = found[-1]
        where = f"{above.source.of((EXTENDS,))}extends = {named!r}: "
        if not isinstance(named, str) or not named:
            raise ConfigError(f"{where}must be the path of a configuration, relative to this file's folder")
        file = find(named, above.file.parent)
        chain = [layer.source.name for layer in found]
        if file.resolve() in [layer.file.resolve() for layer in found]:
            raise ConfigError(f"{where}leads back to itself: {' -> '.join([*chain, str(file)])}")
        if not file.exists():
            raise ConfigError(f"{where}there is no {file}; the path is relative to the folder of {chain[-1]}")
        found.append(read(file, str(file)))
        above.source.base = found[-1].source
    return found


def merged(base: Mapping[str, Any], top: Mapping[str, Any], default_rule: str) -> dict[str, Any]:
    """The tree of a file that says `top` beside that of its base; both may be incomplete or wrong.

    Mappings are merged field by field, anything else of the file takes the place of the base's. A section without
    a value says nothing, and `termination` with another rule replaces the base's, whose fields are of its own rule.
    """
    tree = dict(base)
    for name, own in top.items():
        theirs = base.get(name)
        if own is None:
            tree.setdefault(name, None)
        elif name == "termination" and _other_rule(own, theirs, default_rule):
            tree[name] = own
        elif name in LISTED and isinstance(own, list) and isinstance(theirs, Mapping):
            tree[name] = {**theirs, LISTED[name]: own}
        else:
            tree[name] = _merged(theirs, own)
    return tree


def _merged(base: Any, top: Any) -> Any:
    if not isinstance(base, Mapping) or not isinstance(top, Mapping):
        return top
    return {**base, **{name: _merged(base.get(name), own) for name, own in top.items()}}


def _other_rule(own: Any, theirs: Any, default: str) -> bool:
    if not isinstance(own, Mapping) or not isinstance(theirs, Mapping) or "rule" not in own:
        return False
    return bool(own["rule"] != theirs.get("rule", default))
