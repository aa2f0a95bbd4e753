"""What the configuration allows, in words: for error messages and for docs/configuration.md.

Everything comes from the field declarations of kat_ray.config; nothing is listed here a second time.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kat_ray.config import Config

Schema = Mapping[str, Any]

_BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
_TYPES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}

HEADER = """# Configuration

Written by `kat-ray config --docs` from the field declarations in `kat_ray/config/sections.py` and
`kat_ray/termination/settings.py`; do not edit it by hand.

A configuration is one YAML file, or one that extends another. Every field can be overridden on the command line as
`section.field=value`; the value is read as YAML (`null`, `[0.9, 0.95]`, `1e-4`). Fields that are left out
take their default. Unknown fields, fields given twice and values out of range are refused before anything
is started. Relative paths are relative to the working directory. Overriding `termination.rule` with another
rule drops the file's other `termination` fields, which belong to the file's rule.

`extends: base.yaml` at the top of a file takes another one beneath it, by a path relative to the file's own
folder, or an embedded one by its name (`extends: demo`). The base may extend a further one. Mappings are merged
field by field, names of your own included; lists and all other values take the place of the base's, and so does
`termination` with another rule. A run's own config.yaml has all of it and extends nothing. The
[recipes](recipes/README.md) are built so.

`--resume` can change the fields that say "yes" under "resume"; all others are part of what the run is.
"""


@functools.cache
def root_schema() -> Schema:
    """JSON schema of the whole configuration."""
    return Config.model_json_schema()


def resolve(schema: Schema) -> Schema:
    """Follow a `$ref`; fields beside it (description, default) win over the target's."""
    if "$ref" not in schema:
        return schema
    target = root_schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    return {**target, **{k: v for k, v in schema.items() if k != "$ref"}}


def variants(schema: Schema) -> list[Schema]:
    """The alternatives of a field: of a union its members, otherwise the field itself."""
    schema = resolve(schema)
    members = schema.get("anyOf") or schema.get("oneOf")
    return [resolve(m) for m in members] if members else [schema]


def fields_at(path: Sequence[str | int]) -> dict[str, Schema]:
    """Fields that may stand below `path`, by name; of all rules where the path is a union."""
    return {name: field for variant in _at(path) for name, field in variant.get("properties", {}).items()}


def allowed_at(path: Sequence[str | int]) -> str:
    """What may stand at `path`, in words; empty where nothing can be said."""
    return " or ".join(dict.fromkeys(filter(None, map(_allowed, _at(path)))))


def rules() -> dict[str, Schema]:
    """The termination rules' schemas by the name of the rule."""
    return {v["properties"]["rule"]["const"]: v for v in variants(root_schema()["properties"]["termination"])}


def _at(path: Sequence[str | int]) -> list[Schema]:
    found = [root_schema()]
    for part in path:
        deeper: list[Schema] = []
        for schema in found:
            if isinstance(part, int):
                items = schema.get("prefixItems", [])
                deeper += variants(items[part]) if part < len(items) else []
            elif part in schema.get("properties", {}):
                deeper += variants(schema["properties"][part])
            elif isinstance(values := schema.get("additionalProperties"), dict):
                deeper += variants(values)
        found = deeper
    return found


def _allowed(schema: Schema) -> str:
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "prefixItems" in schema:
        inner = list(dict.fromkeys(_allowed(item) for item in schema["prefixItems"]))
        return f"a list of {len(schema['prefixItems'])}: " + ", ".join(inner)
    kind = schema.get("type")
    if kind == "array":
        return f"a list of {_allowed_of(schema['items'])}"
    if kind == "null":
        return "null"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"{{NAME: {_allowed_of(values)}, ...}}" if isinstance(values, dict) else "a section with fields"
    kind_text = _TYPES.get(str(kind), "")
    if bounds := " and ".join(f"{sign} {schema[key]}" for key, sign in _BOUNDS if key in schema):
        return f"{kind_text} {bounds}"
    if schema.get("minLength"):
        return f"{kind_text} that is not empty"
    return f"{kind_text} that matches {schema['pattern']}" if "pattern" in schema else kind_text


def configuration_markdown() -> str:
    """The text of docs/configuration.md."""
    return "\n".join([HEADER, *_sections()]).rstrip() + "\n"


def _sections() -> Iterator[str]:
    for name, field in root_schema()["properties"].items():
        if name == "termination":
            yield "## termination\n\nWhich rule ends rollouts while they are generated. `rule` names it.\n"
            for rule, schema in rules().items():
                yield f"### termination.rule: {rule}\n\n{_one_line(schema)}\n"
                yield _table("termination", schema)
        elif isinstance(values := field.get("additionalProperties"), dict):
            yield f"## {name}\n\n{_one_line(field)} Of each, by its NAME:\n"
            yield _table(f"{name}.NAME", resolve(values))
        else:
            (schema,) = (v for v in variants(field) if v.get("type") == "object")
            optional = f" {_one_line(field)}" if "anyOf" in field else ""
            yield f"## {name}\n\n{_one_line(schema)}{optional}\n"
            parts = {part: resolve(of) for part, of in schema["properties"].items()}
            if all("properties" in part for part in parts.values()):  # a section of sections
                for part, of in parts.items():
                    yield f"### {name}.{part}\n\n{_one_line(of)}\n"
                    yield _table(f"{name}.{part}", of)
            else:
                yield _table(name, schema, resumable=bool(field.get("resumable")))
                yield from _parts(name, schema)


def _parts(section: str, schema: Schema) -> Iterator[str]:
    """The sections within a section, which may be null; but not those that are sections of their own, too."""
    own = {variant.get("title") for field in root_schema()["properties"].values() for variant in variants(field)}
    for name, field in schema["properties"].items():
        for inner in variants(field):
            if "properties" in inner and inner["title"] not in own:
                yield f"### {section}.{name}\n\n{_one_line(inner)}\n"
                yield _table(f"{section}.{name}", inner, resumable=bool(field.get("resumable")))
        values = field.get("additionalProperties")
        if isinstance(values, dict) and "properties" in (named := resolve(values)):
            yield f"### {section}.{name}\n\n{_one_line(named)} Of each, by its NAME:\n"
            yield _table(f"{section}.{name}.NAME", named)


def _table(section: str, schema: Schema, resumable: bool = False) -> str:
    """The fields of a section; `resumable` where a resume may change them all."""
    rows = ["| field | default | allowed | resume | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, field in schema["properties"].items():
        if field.get("const") is not None:
            continue
        default = f"`{json.dumps(field['default'])}`" if "default" in field else "required"
        if "properties" in resolve(field):
            default = "each field's own"
        allowed = allowed_at([*section.split("."), name]) if section != "termination" else _allowed_of(field)
        allowed = allowed.replace("|", chr(92) + "|")
        resume = "yes" if resumable or field.get("resumable") else ""
        rows.append(f"| `{section}.{name}` | {default} | {allowed} | {resume} | {_one_line(field)} |")
    return "\n".join(rows) + "\n"


def _allowed_of(field: Schema) -> str:
    return " or ".join(dict.fromkeys(filter(None, map(_allowed, variants(field)))))


def _one_line(schema: Schema) -> str:
    return " ".join(schema.get("description", "").split()).replace("|", "\\|")
