"""README.md of an exported model: what it was made of, by which rule, what came out, and how to repeat it.

What only this machine knows is left out: of a local path the last name is shown. No license is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kat_ray.analysis.intervals import accuracy_interval
from kat_ray.config import Config, DataConfig, plain_yaml
from kat_ray.config.data import MixedData
from kat_ray.config.environment import is_environment
from kat_ray.config.load import resolve_path
from kat_ray.data.mixture import MAIN, weights_of
from kat_ray.observability.redact import redact
from kat_ray.records.json_records import EVALUATION, METRICS, SUMMARY, read_json, read_json_lines
from kat_ray.run.summary import package_versions

_PLACES = ("/", "~", "./", "../", "\\")


@dataclass(frozen=True)
class Exported:
    """What a card is about."""

    name: str  # what the model is called
    adapter: bool  # its weights are adapters beside a base
    step: int | None  # optimiser steps; None where the checkpoint's name does not say
    run: Path | None  # None: nothing is known but the checkpoint
    config: Config | None  # of the run
    command: str  # that exported it


def model_card(exported: Exported) -> str:
    """The text of README.md: metadata in YAML, then Markdown."""
    parts = [f"---\n{_yaml(_metadata(exported))}---\n", f"# {exported.name}\n", _what(exported)]
    if exported.config is not None:
        parts += [_table(("", ""), _facts(exported.config)), _figures(exported), _use(exported)]
        parts += [_how(exported, exported.config)]
    else:
        parts += [_use(exported), f"Exported with `{exported.command}`.\n"]
    return redact("\n".join(parts).rstrip() + "\n")


def _metadata(exported: Exported) -> dict[str, Any]:
    config = exported.config
    found: dict[str, Any] = {}
    tags = ["kat-ray"]
    if config is not None:
        if _is_hub(config.student.path):
            found["base_model"] = config.student.path
            found["base_model_relation"] = "adapter" if exported.adapter else "finetune"
        own = list(dict.fromkeys(data.path for data in _data_sets(config).values() if _is_hub(data.path)))
        found |= {"datasets": own} if own else {}
        tags += ["on-policy-distillation"] * bool(config.used_teachers)
        tags += ["reinforcement-learning"] * (config.objective.rl.weight > 0)
        tags += ["lora"] * (config.learner.lora is not None)
    library = "peft" if exported.adapter else "transformers"
    return found | {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}


def _what(exported: Exported) -> str:
    what = "Adapters (LoRA)" if exported.adapter else "A language model"
    steps = "" if exported.step is None else f" after {exported.step:,} optimiser steps"
    of = "" if exported.config is None else f" of the run `{exported.config.run.name}`"
    with_what = f"kat-ray {package_versions().get('kat-ray', '')}".rstrip()
    return f"{what}, trained with {with_what}{steps}{of}. The terms of the base model apply.\n"


def _facts(config: Config) -> Iterator[tuple[str, str]]:
    yield "base model", _named(config.student.path, config.student.revision)
    for name, teacher in config.used_teachers.items():
        told = f", told `{teacher.context}`" if teacher.context else ""
        yield (
            f"teacher{'' if len(config.used_teachers) == 1 else f' {name}'}",
            (_named(teacher.path, teacher.revision) + told),
        )
    shares = weights_of(config.data)
    for name, part in _data_sets(config).items():
        share = f", {shares[name] / sum(shares.values()):.3g} of an epoch" if shares else ""
        yield (MAIN if name == MAIN else f"data {name}"), _data(part) + share
    if config.data.chat_template:
        source = config.data.chat_template
        words = {True: "the base model's own", "student": "the base model's own", "teacher": "the teacher's"}
        extra = f", with {dict(config.data.chat_template_kwargs)}" if config.data.chat_template_kwargs else ""
        yield "chat template", words.get(source, f"`{_short(str(source))}`") + extra
    rule = config.termination.model_dump(mode="json", exclude={"rule"})
    yield "rule", f"`{config.termination.rule}`" + (f" ({_pairs(rule)})" if rule else "")
    objective = [f"distillation {config.objective.opd.weight:g}"] * (config.objective.opd.weight > 0)
    rl = config.objective.rl
    objective += [f"rewards {rl.weight:g} ({rl.advantage}, {rl.loss})"] * (rl.weight > 0)
    yield "objective", ", ".join(objective)
    rollout, learner = config.rollout, config.learner
    yield (
        "a step",
        (
            f"{rollout.prompts_per_step} prompts x {rollout.rollouts_per_prompt} rollouts of at most "
            f"{rollout.max_tokens:,} tokens; learning rate {learner.lr:g}, seed {config.run.seed}"
        ),
    )
    if learner.lora is not None:
        yield "adapters", _pairs(learner.lora.model_dump(mode="json"))


def _data_sets(config: Config) -> dict[str, DataConfig | MixedData]:
    """What prompts are drawn from, by name."""
    return {MAIN: config.data, **config.data.mix}


def _data(data: DataConfig | MixedData) -> str:
    shown = _named(data.path, data.revision)
    extra = [] if Path(data.path).suffix in (".jsonl", ".parquet") or ":" in data.path else [f"split {data.split}"]
    return ", ".join([shown, *([f"name {data.name}"] if data.name else []), *extra])


def _figures(exported: Exported) -> str:
    """What the run recorded up to this step; "" where it recorded nothing."""
    assert exported.run is not None and exported.config is not None
    evaluations, _ = read_json_lines(exported.run / "evaluations.jsonl", EVALUATION)
    lines, _ = read_json_lines(exported.run / "metrics.jsonl", METRICS)
    at = {line["step"]: line for line in evaluations}
    shown = [at[step] for step in dict.fromkeys((0, exported.step)) if step in at]
    parts = [_held_out(shown, exported.config)] if shown else []
    done = [line for line in lines if "learner/loss" in line and line["step"] <= (exported.step or 0)]
    if done:
        parts.append(f"## Training\n{_table(('', ''), _spent(done, exported))}")
    return "\n".join(parts)


def _held_out(lines: Sequence[Mapping[str, Any]], config: Config) -> str:
    evaluation, rows = config.evaluation, []
    for line in lines:
        when = f"after {line['step']:,} steps" if line["step"] else "before training"
        rows.append((when, *_scores(line)))
        rows += [(f"{when}: {name}", *_scores(own)) for name, own in (line.get("sets") or {}).items()]
    data = "" if evaluation.data is None else f"{_data(evaluation.data)}; "
    named = "; ".join(f"`{name}`: {_data(own.data)}" for name, own in evaluation.sets.items() if own.data)
    counts = " or ".join(str(k) for k in sorted({line["k"] for line in lines}))
    return (
        f"## Held-out problems\n{data}{lines[-1]['problems']} problems, {counts} answers each at temperature "
        f"{evaluation.temperature:g} and top_p {evaluation.top_p:g}, graded by `{evaluation.verifier}`"
        f"{f' ({named})' if named else ''}; 95 % intervals over problems.\n\n"
        + _table(("", "avg@k", "pass@k", "mean length", "cut off at the limit"), rows)
    )


def _scores(line: Mapping[str, Any]) -> tuple[str, ...]:
    right, spread = line.get("right", []), ""
    if right:
        low, high = accuracy_interval(right, line["k"])
        spread = f" [{low:.1%}, {high:.1%}]"
    return (
        f"{line['avg_at_k']:.1%}{spread}", f"{line['pass_at_k']:.1%}", f"{line['mean_length']:.0f} tokens",
        f"{line['truncated_share']:.1%}",
    )  # fmt: skip


def _spent(lines: Sequence[Mapping[str, Any]], exported: Exported) -> Iterator[tuple[str, str]]:
    assert exported.run is not None
    yield "steps", f"{len(lines):,}"
    for name, metric in (("generated", "rollout/generated_tokens"), ("trained on", "learner/tokens")):
        yield f"tokens {name}", f"{sum(line.get(metric) or 0 for line in lines):,.0f}"
    for name, metric in (("KL to the teacher of kept tokens, nats", "kl/kept_mean"), ("reward", "reward/mean")):
        values = [line[metric] for line in lines if line.get(metric) is not None]
        if values:
            yield f"{name}, first and last step", f"{values[0]:.4g}, {values[-1]:.4g}"
    summary = exported.run / "summary.json"
    if summary.is_file() and (ended := read_json(summary, SUMMARY)).get("steps") == exported.step:
        yield "hours", f"{ended['wall_seconds'] / 3600:.2f}"


def _use(exported: Exported) -> str:
    name = exported.name
    if exported.adapter:
        return (
            f"## Use\n```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")\n```\n'
        )
    return (
        "## Use\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f"```\n\nor `vllm serve {name}`.\n"
    )


def _how(exported: Exported, config: Config) -> str:
    settings = _shortened(settings_of(config))
    versions = _pairs({k: v for k, v in _versions(exported).items() if k != "kat-ray"})
    return (
        "## Made with\n```sh\nkat-ray train settings.yaml\n"
        f"{exported.command}\n```\n\nwhere settings.yaml holds (local folders by their last name)\n\n"
        f"```yaml\n{_yaml(settings)}```\n\nPackages: {versions}.\n"
    )


def settings_of(config: Config) -> dict[str, Any]:
    """What a configuration file must say to give this configuration; all of it where some default is not."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    tree["termination"] = {"rule": config.termination.rule, **tree.get("termination", {})}
    return tree if Config.model_validate(tree) == config else config.model_dump(mode="json")


def _versions(exported: Exported) -> Mapping[str, Any]:
    """Those of the run where it has ended, else of who exports it."""
    assert exported.run is not None
    summary = exported.run / "summary.json"
    if summary.is_file() and (found := read_json(summary, SUMMARY).get("versions")):
        return dict(found)
    return package_versions()


def _is_hub(path: str) -> bool:
    """Whether a configuration's path names a repository of the hub."""
    if path.startswith((*_PLACES, "demo:")) or is_environment(path) or path.count("/") > 1:
        return False
    return Path(path).suffix not in (".jsonl", ".parquet", ".json") and not resolve_path(path).exists()


def _named(path: str, revision: str | None) -> str:
    if _is_hub(path):
        return f"`{path}`" + (f" at `{revision}`" if revision else "")
    if path.startswith("demo:") or is_environment(path):
        return f"`{path}`"
    return f"`{_short(path)}` (local)"


def _short(text: str) -> str:
    """A local path by its last name; `file.py:function` and others stay as they are."""
    return text.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] if text.startswith(_PLACES) else text


def _shortened(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _shortened(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shortened(v) for v in value]
    return _short(value) if isinstance(value, str) and "\n" not in value and " " not in value else value


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items() if v is not None)


def _yaml(value: Mapping[str, Any]) -> str:
    return str(yaml.dump(dict(value), Dumper=plain_yaml.Dumper, sort_keys=False, allow_unicode=True))


def _table(head: Sequence[str], rows: Any) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
