"""YAML as plain data: mappings, lists, text, numbers, true, false, null. Nothing in a file can run or explode.

YAML 1.2's plain values on PyYAML's safe loader. Refused, each with its place: tags for anything else (dates, bytes,
sets, Python objects), aliases that contain themselves or multiply into more than `MAX_NODES` values, numbers of
more than `MAX_DIGITS` digits, and nesting deeper than the interpreter can follow.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_NODES = 100_000  # a configuration has some hundred
MAX_DIGITS = 400  # more than a float can hold; Python itself converts no more than 4,300
_PREFIX = "tag:yaml.org,2002:"
_COLLECTIONS = (_PREFIX + "map", _PREFIX + "seq")


class Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain values.

    YAML 1.1 reads 1e-4 as text, `no` as false, 1:30 as 90, 010 as 8 and 2026-01-02 as a date.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own way


class Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or `Loader` would read as something else, such as a path `1e5`."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Line breaks of YAML 1.1 that only a double-quoted scalar escapes; in others they come back as newlines.
    style = '"' if any(c in text for c in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(f"{_PREFIX}str", text, style=style)


Dumper.add_representer(str, _text)


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$",
        list("-+.0123456789"),
    ),
    ("merge", r"^<<$", ["<"]),
):
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"{_PREFIX}{_tag}", re.compile(_pattern), _first)


def compose(text: str) -> yaml.Node | None:
    """The nodes of a document, checked; None of an empty one. yaml.YAMLError for whatever is wrong."""
    try:
        node = yaml.compose(text, Loader)
        if node is not None:
            _Checked().size(node)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    return node


def construct(node: yaml.Node) -> Any:
    """The value of nodes that `compose` has checked; yaml.YAMLError, for an unhashable key for example."""
    loader = Loader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


class _Checked:
    """Counts what a document stands for once its aliases are written out, and refuses what is not plain."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self._loader = Loader("")

    def size(self, node: yaml.Node) -> int:
        """Values under a node, itself included."""
        known = self._sizes.get(id(node))
        if known is None:
            self._sizes[id(node)] = 0  # open: to meet it again is to be inside of it
            known = self._sizes[id(node)] = 1 + sum(self.size(below) for below in self._below(node))
            if known > MAX_NODES:
                raise _refused(node, f"its aliases stand for more than {MAX_NODES:,} values")
        elif known == 0:
            raise _refused(node, "an alias contains itself")
        return known

    def _below(self, node: yaml.Node) -> list[yaml.Node]:
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)
            return []
        if node.tag not in _COLLECTIONS or (node.tag == _COLLECTIONS[0]) != isinstance(node, yaml.MappingNode):
            raise _refused(node, f"the tag {node.tag} is not taken here")
        if isinstance(node, yaml.MappingNode):
            return [part for pair in node.value for part in pair]
        return list(node.value)

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        text: str = node.value
        if node.tag != _PREFIX + "str" and node.tag != self._loader.resolve(yaml.ScalarNode, text, (True, False)):
            raise _refused(node, f"the tag {node.tag} does not fit {text[:40]!r}")
        if node.tag == _PREFIX + "int" and len(text) > MAX_DIGITS:
            raise _refused(node, f"a number of {len(text)} digits")


def _refused(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
