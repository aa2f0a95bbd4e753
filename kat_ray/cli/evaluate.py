"""`kat-ray eval`: a model or a run on held-out sets, as a table with intervals."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kat_ray.config import Config, EvaluationConfig
from kat_ray.config.load import config_from, load_config, resolve_path
from kat_ray.config.local_paths import is_bucket_url
from kat_ray.config.presets import PRESETS
from kat_ray.errors import UserError
from kat_ray.rewards.verifiers import EvalResult
from kat_ray.storage.address import Address

# Of a model alone: a configuration in which nothing but the student is read.
_ALONE: Mapping[str, Any] = {
    "objective": {"opd": {"weight": 0.0}, "rl": {"weight": 1.0}},
    "termination": {"rule": "none"},
    "reward": {"functions": {"format": 1.0}, "format_pattern": "."},  # asks for no gold answers beside the held-out
    "rollout": {"rollouts_per_prompt": 2, "temperature": 1.0, "top_p": 1.0},
}
_CHAT = ("chat_template", "chat_template_kwargs", "system_prompt")


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    model: str
    config: str | None = None
    data: Sequence[str] = ()  # held-out sets: names of presets, files, folders, hub ids
    chat: bool = False  # the model's own chat template
    greedy: bool = False
    overrides: Sequence[str] = ()


def stored_model(model: str, config: str | None) -> tuple[str, str | None]:
    """Model and configuration as they were given; of a checkpoint in a bucket as they are on this machine now."""
    if not is_bucket_url(model):
        return model, config
    from kat_ray.run.stored_copy import copied_model, resolved

    folder = copied_model(resolved(Address.of(model)))
    return str(folder), config or str(folder.parent.parent / "config.yaml")


def configuration(asked: Asked) -> tuple[Config, str]:
    """The configuration, and the model: a checkpoint of a run, a directory or a hub id."""
    from kat_ray.cli.export import newest_checkpoint

    path = resolve_path(asked.model)
    is_run = (path / "config.yaml").is_file()
    model = str(newest_checkpoint(path)) if is_run else asked.model
    more = [*(["evaluation.greedy=true"] if asked.greedy else []), *asked.overrides]
    if asked.config is not None or is_run:
        source = asked.config or path / "config.yaml"
        overrides = _overrides(load_config(source, []), asked) if asked.data or asked.chat else []
        return load_config(source, [*overrides, *more]), model
    if not asked.data:
        raise UserError(
            f"{asked.model}: not a run directory (no config.yaml in it); name the problems with --data, such as "
            f"{', '.join(PRESETS)}, or with --config"
        )
    evaluation = _evaluation(asked.data, {"chat_template": True} if asked.chat else {})
    tree = {**_ALONE, "student": {"path": asked.model}, "evaluation": evaluation}
    probe = config_from({**tree, "data": {"path": "unread"}}, more)  # a preset's fields are filled in there
    assert probe.evaluation.data is not None
    # The data stand for the prompts of training, which nobody samples. Its length is the shortest, so that what
    # is too long for the model is refused by the name of what is asked for.
    own = probe.evaluation.data.model_dump(mode="json")
    rollout, answer = {**_ALONE["rollout"], "max_tokens": 1}, {"max_tokens": probe.eval_max_tokens}
    return config_from(
        {**tree, "data": own, "rollout": rollout, "evaluation": {**evaluation, **answer}}, more
    ), model


def check_files(config: Config) -> None:
    """`UserError` for a file of held-out problems that is not there, before anything else of it is judged."""
    for part in config.evaluation.parts().values():
        path = part.data.path if part.data is not None else ""
        if Path(path).suffix in (".jsonl", ".parquet") and not resolve_path(path).exists():
            raise UserError(f"{path}: no such file of held-out problems")


def _overrides(config: Config, asked: Asked) -> list[str]:
    """Of a configuration that has held-out problems of its own."""
    chat = config.data.model_dump(mode="json", include=set(_CHAT)) | ({"chat_template": True} if asked.chat else {})
    if not asked.data:
        return [f"evaluation.data.{name}={json.dumps(chat[name])}" for name in ("chat_template",)]
    tree = _evaluation(asked.data, chat)
    own = {"preset": None, "every_k": None, **tree}
    if asked.data[0] in PRESETS:  # before what the configuration has for its own problems
        own |= {name: PRESETS[asked.data[0]][name] for name in ("verifier", "k")}
    return [f"evaluation.{name}={json.dumps(value)}" for name, value in own.items()]


def _evaluation(data: Sequence[str], chat: Mapping[str, Any]) -> dict[str, Any]:
    """The section: the first set is `evaluation.data`, the others are named after themselves."""
    first, *others = [_one(name, chat) for name in data]
    sets: dict[str, Any] = {}
    for name, tree in zip(data[1:], others, strict=True):
        stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).stem).strip("-") or "set"
        sets[stem if stem not in sets else f"{stem}-{len(sets) + 1}"] = tree
    return {**first, "sets": sets}


def _one(name: str, chat: Mapping[str, Any]) -> dict[str, Any]:
    return {"preset": name, "data": dict(chat)} if name in PRESETS else {"data": {"path": name, **chat}}


def _name(part: EvaluationConfig) -> str:
    assert part.data is not None
    return Path(part.data.path).name


def table(config: Config, result: EvalResult) -> str:
    """One line for each set, with 95 % intervals over its problems."""
    from kat_ray.analysis.intervals import accuracy_interval, wilson

    head = ("", "problems", "k", "temperature", "avg@k", "pass@k", "tokens", "cut off", "ran out")
    rows = [head]
    parts = config.evaluation.parts()
    for name, own in {"": result, **(result.sets or {})}.items():
        part = parts[name]
        low, high = accuracy_interval(own.right, own.k) if own.right else (0.0, 1.0)
        least, most = wilson(own.pass_at_k, own.problems)
        rows.append(
            (
                name or part.preset or _name(part), str(own.problems),
                str(own.k), f"{part.temperature:g}", f"{own.avg_at_k:.1%} [{low:.1%}, {high:.1%}]",
                f"{own.pass_at_k:.1%} [{least:.1%}, {most:.1%}]", f"{own.mean_length:.0f}",
                f"{own.truncated_share:.1%}", str(own.ran_out),
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    note = (
        "95 % intervals over problems: a bootstrap of avg@k, Wilson's of pass@k and of one answer each; what a "
        "model sampled is not drawn again"
    )
    return "\n".join([*lines, note])
