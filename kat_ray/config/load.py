"""Configuration files: read, overridden, checked, and written back.

Everything that can be wrong becomes one `ConfigError` that names file, line, field, value and what is allowed,
one line for each mistake. A file may extend another (`kat_ray.config.extends`); a run's own configuration is one
file, with all of both.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from kat_ray.config import Config, plain_yaml, schema
from kat_ray.config.extends import Layer, Path_, Source, layers, merged
from kat_ray.config.local_paths import ADVICE, RUN_ADVICE, RUN_URL, URL, is_url
from kat_ray.config.tracking import LISTED
from kat_ray.errors import ConfigError
from kat_ray.observability.redact import redact
from kat_ray.termination import RULES

DEMO_DIR = Path(__file__).parents[1] / "demo"
EMBEDDED = {  # configurations
    "demo": DEMO_DIR / "default.yaml",
    "demo-rl": DEMO_DIR / "rl.yaml",
    "demo-long": DEMO_DIR / "long.yaml",
    "demo-hints": DEMO_DIR / "hints.yaml",
}
DEMO_FILES = {
    **EMBEDDED,
    "demo:student": DEMO_DIR / "models" / "student",
    "demo:teacher": DEMO_DIR / "models" / "teacher",
    "demo:train": DEMO_DIR / "data" / "train.jsonl",
    "demo:heldout": DEMO_DIR / "data" / "heldout.jsonl",
    "demo:long-student": DEMO_DIR / "long" / "student",
    "demo:long-teacher": DEMO_DIR / "long" / "teacher",
    "demo:hints": DEMO_DIR / "hints" / "train.jsonl",
    "demo:hints-student": DEMO_DIR / "hints" / "student",
}

_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes; Linux


def resolve_path(name: str) -> Path:
    """The path that a config value names; `demo:...` names a file of the package. The path need not exist."""
    if not name.startswith("demo:"):
        return usable_path(name)
    if name not in DEMO_FILES:
        known = ", ".join(k for k in DEMO_FILES if ":" in k)
        raise ConfigError(f"{name!r} names nothing embedded; there are {known}")
    return DEMO_FILES[name]


def usable_path(text: str) -> Path:
    """The path, `~` resolved; `ConfigError` where no file system takes it, which each access would raise again."""
    if is_url(text):
        raise ConfigError(f"{_shown(redact(text))}: {ADVICE}")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise ConfigError(f"{_shown(text)}: there is no such user's home directory") from error
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts) or len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(f"{_shown(text)}: is too long for a path")
    return path


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.field=value` overrides, and check everything.

    `demo`, `demo-rl`, `demo-long` and `demo-hints` name the embedded configurations. `ConfigError` lists every
    mistake.
    """
    tree: dict[str, Any] = {}
    found = _layers(path)
    for layer in reversed(found):
        tree = merged(tree, layer.tree, _default_rule())
    return _overridden(_drop_empty(tree), overrides, found[0].source)


def config_files(path: str | Path) -> list[Path]:
    """The file of a configuration and all that it extends, itself first; none of them is checked further."""
    return [layer.file for layer in _layers(path)]


def _layers(path: str | Path) -> list[Layer]:
    def read(file: Path, name: str) -> Layer:
        source = Source(name)
        return Layer(file, _read_file(file, source), source)

    def find(name: str, folder: Path) -> Path:
        return EMBEDDED.get(name) or folder / usable_path(name)

    return layers(read(EMBEDDED.get(str(path)) or usable_path(str(path)), str(path)), find, read)


def config_from(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """As `load_config`, of what a command makes itself."""
    return _overridden(dict(tree), overrides, Source("the command"))


def _overridden(tree: dict[str, Any], overrides: Sequence[str], source: Source) -> Config:
    for override in overrides:
        _check_override(override, source)
    _drop_other_rule(tree, overrides)
    for override in overrides:
        _apply(tree, override, source)
    if isinstance(termination := tree.get("termination"), dict):
        termination.setdefault("rule", _default_rule())
    return _validate(tree, source)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration; `load_config` gives an equal one back."""
    path.write_text(config_yaml(config), encoding="utf-8")


def config_yaml(config: Config) -> str:
    """The resolved configuration as YAML, every field spelled out."""
    tree = config.model_dump(mode="json")
    return str(yaml.dump(tree, Dumper=plain_yaml.Dumper, sort_keys=False, allow_unicode=True))


def _read_file(file: Path, source: Source) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        embedded = ", ".join(f"`{name}`" for name in EMBEDDED)
        raise ConfigError(f"{source.name}: no such file; embedded configurations: {embedded}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError(f"{source.name}: cannot be read: {reason}") from error
    try:
        node = plain_yaml.compose(text)
        if node is None:
            raise ConfigError(f"{source.name}: the file is empty; a configuration names at least {_required()}")
        _note_lines(node, (), source)
        tree = plain_yaml.construct(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{source.name}{where}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a control character, for example
        raise ConfigError(f"{source.name}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source.name}: a configuration is a mapping of sections, this is {_shown(tree)}")
    return tree


def _required() -> str:
    return ", ".join(schema.root_schema()["required"])


def _note_lines(node: yaml.Node, path: Path_, source: Source) -> None:
    """Record the line of every field; refuse a field given twice."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        line = key.start_mark.line + 1
        here = (*path, str(key.value))
        if here in source.lines and key.tag != "tag:yaml.org,2002:merge":
            name = ".".join(map(str, here))
            raise ConfigError(f"{source.name}:{line}: {name} is given twice, first in line {source.lines[here]}")
        source.lines[here] = line
        _note_lines(value, here, source)


def _drop_empty(tree: dict[str, Any]) -> dict[str, Any]:
    """A section whose fields are all commented out is null in YAML and means the defaults here."""
    return {k: v for k, v in tree.items() if v is not None}


def _default_rule() -> str:
    default = Config.model_fields["termination"].get_default(call_default_factory=True)
    rule: str = default.rule
    return rule


def _drop_other_rule(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    rules = [o.split("=", 1)[1].strip() for o in overrides if o.split("=", 1)[0].strip() == "termination.rule"]
    termination = tree.get("termination")
    if rules and isinstance(termination, dict) and rules[-1] != termination.get("rule", _default_rule()):
        tree["termination"] = {}


def _check_override(override: str, source: Source) -> None:
    key, equals, _ = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"override {override!r}: write it as section.field=value, for example run.steps=20")
    source.overrides[tuple(part.strip() for part in key.split("."))] = override


def yaml_value(text: str, where: str) -> Any:
    """The value that stands after `FIELD=`; `where` names it in messages."""
    try:
        node = plain_yaml.compose(text)
        if node is None:
            return None
        _note_lines(node, (), Source(where))
        return plain_yaml.construct(node)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{where}: the value is not valid YAML: {problem}") from error


def _apply(tree: dict[str, Any], override: str, source: Source) -> None:
    key, _, text = override.partition("=")
    *parents, last = (part.strip() for part in key.split("."))
    value = yaml_value(text, f"override {override}")
    target = tree
    for depth, part in enumerate(parents):
        below = target.get(part)
        if below is None:
            below = {}
        if depth == 0 and part in LISTED and isinstance(below, list):
            below = {LISTED[part]: below}
        if not isinstance(below, dict):
            name = ".".join(parents[: depth + 1])
            raise ConfigError(f"override {override}: {name} is {_shown(below)}, it has no fields")
        target[part] = target = dict(below)  # a copy: an alias may share the mapping
    target[last] = value


def _validate(tree: Mapping[str, Any], source: Source) -> Config:
    _check_texts(tree, (), source)
    rule = tree["termination"].get("rule") if isinstance(tree.get("termination"), Mapping) else None
    if isinstance(rule, str):
        RULES.get(rule)  # one of another package that cannot be used says so here
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        lines = dict.fromkeys(_message(e, source) for e in error.errors())
        raise ConfigError("\n".join(lines)) from None
    if flags := flags_as_numbers(tree, config):
        raise ConfigError("\n".join(_wrong(path, value, source) for path, value in flags))
    return config


def section_error(error: ValidationError, section: Path_, changes: Mapping[str, Any]) -> ConfigError:
    """What is wrong with a section that was read alone, in the words of a whole configuration's errors.

    `changes` are what was given on the command line; a section of a rule is ("termination", NAME).
    """
    place = _without_tags(section)
    given: dict[Path_, str] = {(*place, name): f"{name}={_shown(value)}" for name, value in changes.items()}
    if changes:  # of what no single field is to blame for
        given[place] = " ".join(given.values())
    source = Source("the command", overrides=given)
    lines = dict.fromkeys(_message({**e, "loc": (*section, *e["loc"])}, source) for e in error.errors())
    return ConfigError("\n".join(lines))


def _check_texts(value: Any, path: Path_, source: Source) -> None:
    """Refuse text that no file, tokenizer or terminal takes, and secrets: a run stores its configuration."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            _check_texts(key, path, source)
            _check_texts(below, (*path, key if isinstance(key, int) else str(key)), source)
    elif isinstance(value, list):
        for index, below in enumerate(value):
            _check_texts(below, (*path, index), source)
    elif isinstance(value, str):
        if "\0" in value or not _is_unicode(value):
            raise ConfigError(
                f"{source.of(path)}{_dotted(path)} = {_shown(value)}: holds a NUL or half a character (a surrogate)"
            )
        if redact(value) != value:  # the value is not shown
            raise ConfigError(
                f"{source.of(path)}{_dotted(path)} holds a secret (a token of the environment, or a password in an "
                "address), and a run stores its configuration: give it through the environment (HF_TOKEN, "
                "RAY_AUTH_TOKEN), or a file of the library that asks for it"
            )


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def flags_as_numbers(raw: Any, parsed: Any, path: Path_ = ()) -> list[tuple[Path_, Any]]:
    """Values given as true or false that became numbers, with their places: pydantic reads true as 1."""
    if isinstance(raw, bool) and not isinstance(parsed, bool):
        return [(path, raw)]
    pairs: list[tuple[str | int, Any, Any]] = []
    if isinstance(raw, Mapping) and isinstance(parsed, BaseModel):
        pairs = [(name, value, getattr(parsed, name)) for name, value in raw.items()]
    elif isinstance(raw, Mapping) and isinstance(parsed, Mapping):  # names of the user's
        pairs = [(name, value, parsed[name]) for name, value in raw.items()]
    elif isinstance(raw, list) and isinstance(parsed, tuple):
        pairs = [(i, *both) for i, both in enumerate(zip(raw, parsed, strict=True))]
    return [found for name, r, p in pairs for found in flags_as_numbers(r, p, (*path, name))]


def refuse_flags(raw: Mapping[str, Any], parsed: BaseModel) -> None:
    """`ConfigError` names the fields of a section that were given true or false in place of a number."""
    if flags := flags_as_numbers(raw, parsed):
        raise ConfigError("; ".join(f"{_dotted(path)} = {_shown(flag)}: must be a number" for path, flag in flags))


def _message(error: Any, source: Source) -> str:
    path = _without_tags(error["loc"])
    kind, value = error["type"], error["input"]
    name = _dotted(path)
    if kind == "extra_forbidden":
        return f"{source.of(path)}{name}: unknown field{_suggestion(path, error['loc'])}"
    if kind == "missing":
        allowed = schema.allowed_at(path)
        return f"{source.of(path[:-1])}{name} is missing" + (f": {allowed}" if allowed else "")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        rule = value.get("rule") if isinstance(value, Mapping) else value
        names = list(schema.rules())
        return (
            f"{source.of((*path, 'rule'))}{name}.rule = {_shown(rule)}: must be one of {', '.join(names)}"
            f"{_close(str(rule), names)}"
        )
    if kind == "invalid_key":
        return f"{source.of(path[:-1])}{name}: the name of a field must be text"
    if kind == "value_error":  # of a validator: it has named field and value itself
        return f"{source.of(path)}{name + '.' if name else ''}{error['ctx']['error']}"
    if kind == URL:
        return f"{source.of(path)}{name} = {_shown(redact(value))}: {ADVICE}"
    if kind == RUN_URL:
        return f"{source.of(path)}{name} = {_shown(redact(value))}: {RUN_ADVICE}"
    if not schema.allowed_at(path) and schema.allowed_at(path[:-1]):
        path = path[:-1]  # of a union pydantic names each alternative: true or false, or text
    return _wrong(path, value, source)


def _wrong(path: Path_, value: Any, source: Source) -> str:
    allowed = schema.allowed_at(path)
    text = f"{source.of(path)}{_dotted(path)} = {_shown(value)}: must be {allowed or 'something else'}"
    if isinstance(value, int | float) and allowed.startswith("text"):
        text += "; put it in quotes"
    if isinstance(value, str) and allowed.startswith("one of "):
        text += _close(value, allowed.removeprefix("one of ").split(", "))
    return text


def _without_tags(loc: Sequence[str | int]) -> Path_:
    """Drop what pydantic adds for unions: the rule after `termination`."""
    return tuple(part for i, part in enumerate(loc) if not (i == 1 and loc[0] == "termination"))


def _suggestion(path: Path_, loc: Sequence[str | int]) -> str:
    name, parents = str(path[-1]), path[:-1]
    if parents == ("termination",):
        rule = str(loc[1])
        known = list(schema.rules()[rule]["properties"])
        others = [r for r, s in schema.rules().items() if name in s["properties"]]
        if others and name not in known:
            return f" of rule {rule}; it belongs to rule {' and '.join(others)}"
    else:
        known = list(schema.fields_at(parents))
    if close := _close(name, known):
        return close
    elsewhere = [f"{s}.{name}" for s in schema.fields_at(()) if name in schema.fields_at((s,))]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; known are {', '.join(known)}" if known else ""


def _close(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _dotted(path: Path_) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _shown(value: Any) -> str:
    """The value as YAML-like text, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=isinstance(value, str) and not _is_unicode(value))
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
