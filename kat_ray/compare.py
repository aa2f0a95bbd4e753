"""`kat-ray compare`: each rule from the same start, on the same prompts and seeds; a table that says what differs.

Every (rule, seed) is a run of its own in `<out>/<rule>/seed-<n>`; one that has its summary is not run again, so an
interrupted comparison goes on where it was. Differences are paired by seed and by held-out problem.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import TypeAdapter, ValidationError

from kat_ray.config import Config
from kat_ray.config_io import load_config
from kat_ray.errors import UserError
from kat_ray.termination import RULES, TerminationConfig

BASELINES = ("none", "length_matched")
RESAMPLES = 4000
MEASURES = {
    "avg_at_k": "avg@k",
    "pass_at_k": "pass@k",
    "mean_length": "kept tokens / rollout",
    "generated_tokens": "generated tokens",
    "scored_tokens": "scored tokens",
    "trained_tokens": "trained tokens",
    "overshoot_tokens": "overshoot tokens",
    "tflop": "TFLOP",
    "wall_seconds": "seconds",
}


@dataclass(frozen=True)
class Arm:
    """One rule of a comparison: its label, which is also its folder, and its settings' fields."""

    label: str
    rule: str
    fields: Mapping[str, Any]


def parse_arm(text: str) -> Arm:
    """`rule` or `rule:field=value,field=value`."""
    name, _, rest = text.partition(":")
    if name not in RULES:
        raise UserError(f"--rules {text!r}: {name!r} is no rule; there are {', '.join(RULES)}")
    fields = {}
    for part in filter(None, rest.split(",")):
        field, separator, value = part.partition("=")
        if not separator or field not in RULES[name].settings.model_fields or field == "rule":
            known = ", ".join(f for f in RULES[name].settings.model_fields if f != "rule")
            raise UserError(f"--rules {text!r}: {part!r} must be FIELD=VALUE with one of {known}")
        fields[field] = yaml.safe_load(value)
    label = "-".join([name, *(f"{k}={v}" for k, v in fields.items())]).replace("/", "_")
    return Arm(label, name, fields)


def config_of(base: Config, arm: Arm, seed: int, out: Path) -> Config:
    """The configuration of one run: only the rule, the seed and the folder differ from `base`.

    The rule's fields are those of `base` where it has the same rule, else the rule's defaults. A `length_matched`
    rule without a run copies the `kat` run of the same seed.
    """
    same = base.termination.rule == arm.rule
    fields: dict[str, Any] = base.termination.model_dump() if same else {"rule": arm.rule}
    if arm.rule == "length_matched" and "run" not in {**fields, **arm.fields}:
        fields["run"] = str(out / "kat" / f"seed-{seed}")
    if "probe_share" not in fields and "probe_share" in RULES[arm.rule].settings.model_fields:
        fields["probe_share"] = getattr(base.termination, "probe_share", 0.1)  # the same share in all arms
    try:
        rule = TypeAdapter(TerminationConfig).validate_python({**fields, **arm.fields})
    except ValidationError as error:
        raise UserError(
            f"--rules {arm.label}: {error.errors()[0]['loc'][-1]}: {error.errors()[0]['msg']}"
        ) from error
    run = base.run.model_copy(
        update={"dir": str(out / arm.label), "name": f"seed-{seed}", "seed": seed, "overwrite": True}
    )
    return base.model_copy(update={"termination": rule, "run": run})


def order_of(arms: Sequence[Arm]) -> list[Arm]:
    """`length_matched` last: it copies the lengths of a finished run."""
    if len({arm.label for arm in arms}) < len(arms):
        raise UserError("--rules: the same rule stands there twice")
    if any(a.rule == "length_matched" and "run" not in a.fields for a in arms) and "kat" not in {
        a.label for a in arms
    }:
        raise UserError(
            "--rules length_matched: add kat, whose lengths it copies, or name a run: length_matched:run=DIR"
        )
    return sorted(arms, key=lambda a: a.rule == "length_matched")


def run_all(
    base: Config,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    out: Path,
    train: Callable[[Config], Any],
    say: Callable[[str], None],
) -> None:
    """Run what has no summary yet; `train` runs one configuration."""
    ordered = order_of(arms)
    total = len(ordered) * len(seeds)
    for number, (seed, arm) in enumerate(((s, a) for s in seeds for a in ordered), 1):
        config = config_of(base, arm, seed, out)
        folder = out / arm.label / f"seed-{seed}"
        if (folder / "summary.json").is_file():
            check_same(config, folder)
            say(f"[{number}/{total}] {arm.label}, seed {seed}: done before")
            continue
        say(f"[{number}/{total}] {arm.label}, seed {seed}")
        train(config)


def check_same(config: Config, folder: Path) -> None:
    """Refuse a finished run that differs from what would be run now; names the fields."""
    then = load_config(folder / "config.yaml")
    if differing := differences(config, then):
        raise UserError(
            f"{folder} was run with other settings ({'; '.join(differing)}): remove it, or choose another --out"
        )


def differences(one: Config, other: Config) -> list[str]:
    """Fields that differ, as `section.field: a, was b`."""
    a, b = _flat(one.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
    return [f"{k}: {a.get(k)!r}, was {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@dataclass(frozen=True)
class Result:
    """One arm over its seeds: measures [seeds] by name, and right answers [seeds, problems] as shares of k."""

    label: str
    seeds: tuple[int, ...]
    folders: tuple[Path, ...]
    measures: Mapping[str, np.ndarray]
    right: np.ndarray

    def pairs_with(self, other: Result) -> bool:
        """Whether both have the same seeds and as many problems."""
        return self is not other and self.seeds == other.seeds and self.right.shape == other.right.shape


def read_results(arms: Sequence[Arm], seeds: Sequence[int], out: Path) -> list[Result]:
    """What the finished runs of a comparison left."""
    return [read_result(a.label, [(s, out / a.label / f"seed-{s}") for s in seeds]) for a in arms]


def read_result(label: str, runs: Sequence[tuple[int, Path]]) -> Result:
    """One arm from its finished runs, (seed, directory)."""
    summaries = []
    for _, folder in runs:
        if not (folder / "summary.json").is_file():
            raise UserError(f"{folder}: no summary.json in it: not a run directory, or its run has not ended")
        summaries.append(json.loads((folder / "summary.json").read_text()))
        if summaries[-1]["eval_after"] is None:
            raise UserError(f"{folder}: it was not evaluated; a comparison needs held-out problems")
    rows = [_measures(s) for s in summaries]
    measures = {name: np.array([row[name] for row in rows], dtype=float) for name in MEASURES}
    rights = [_right(folder) for _, folder in runs]
    if len({len(right) for right in rights}) > 1:
        raise UserError(f"{runs[0][1]} and others of rule {label} were evaluated on different numbers of problems")
    return Result(label, tuple(s for s, _ in runs), tuple(f for _, f in runs), measures, np.array(rights))


def read_runs(paths: Sequence[Path]) -> tuple[list[Result], list[str]]:
    """Arms from any finished runs, grouped by their rule, and notes on what else they differ in."""
    configs = []
    for path in paths:
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path}: no config.yaml in it; name run directories")
        configs.append(load_config(path / "config.yaml"))
    groups: dict[str, list[tuple[int, Path]]] = {}
    for path, config in zip(paths, configs, strict=True):
        label = _label_of(config, configs)
        if config.run.seed in (s for s, _ in groups.get(label, [])):  # it differs in something else
            label = f"{label} ({path})"
        groups.setdefault(label, []).append((config.run.seed, path))
    notes = []
    for path, config in zip(paths[1:], configs[1:], strict=True):
        if more := [d for d in differences(config, configs[0]) if not d.startswith(("termination.", "run."))]:
            notes.append(f"{path} differs from {paths[0]} in more than the rule: {'; '.join(more)}")
        if config.run.steps != configs[0].run.steps:
            notes.append(f"{path} has {config.run.steps} steps, {paths[0]} {configs[0].run.steps}")
    return [read_result(label, sorted(runs)) for label, runs in groups.items()], notes


def _label_of(config: Config, all_configs: Sequence[Config]) -> str:
    """The rule's name, with the fields in which runs of this rule differ; the run that is copied does not count."""
    same = [c.termination for c in all_configs if c.termination.rule == config.termination.rule]
    own = config.termination.model_dump(exclude={"rule", "run"})
    differing = [k for k, v in own.items() if any(getattr(t, k) != v for t in same)]
    return "-".join([config.termination.rule, *(f"{k}={own[k]}" for k in differing)])


def _measures(summary: Mapping[str, Any]) -> dict[str, float]:
    evaluation = summary["eval_after"]
    own = {name: float(summary[name]) for name in MEASURES if name in summary}
    return own | {
        "avg_at_k": evaluation["avg_at_k"],
        "pass_at_k": evaluation["pass_at_k"],
        "mean_length": summary["kept_tokens"] / summary["rollouts_started"],
        "tflop": tflop(summary),
    }


def tflop(summary: Mapping[str, Any]) -> float:
    """Arithmetic of a run in TFLOP: 2 per parameter and token forward, 6 with the backward pass.

    Student: prompts and generated tokens; teacher: prompts and scored tokens; learner: prompts and trained tokens.
    Attention over the past and padding are left out, evaluation too.
    """
    student, teacher = summary["parameters"]["student"], summary["parameters"]["teacher"]
    prompts = summary["prompt_tokens"]
    return 1e-12 * (
        2 * student * (prompts + summary["generated_tokens"])
        + 2 * teacher * (prompts + summary["scored_tokens"])
        + 6 * student * (prompts + summary["trained_tokens"])
    )


def _right(folder: Path) -> list[float]:
    last = (folder / "evaluations.jsonl").read_text().splitlines()[-1]
    record = json.loads(last)
    return [n / record["k"] for n in record["right"]]


def paired_difference(one: Result, other: Result, seed: int = 0) -> tuple[float, float, float]:
    """Mean difference in avg@k, one - other, and its 95 % bootstrap interval over seeds and problems.

    Both are resampled, the same seeds and problems on both sides. That is cautious: where seeds and problems do not
    interact, the interval is up to sqrt(3) times too wide.
    """
    gap = one.right - other.right
    rng = np.random.default_rng(seed)
    seeds, problems = gap.shape
    draws = [
        gap[rng.integers(seeds, size=seeds)][:, rng.integers(problems, size=problems)].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(gap.mean()), float(low), float(high)


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: mean and, over several seeds, standard deviation; differences to the baselines."""
    baselines = [r for r in results if r.label in BASELINES]
    heading = ["rule", *MEASURES.values(), *(f"avg@k - {b.label} [95 %]" for b in baselines)]
    rows = []
    for result in results:
        row = [result.label]
        for name in MEASURES:
            values = result.measures[name]
            digits = ".1%" if name in ("avg_at_k", "pass_at_k") else (".3f" if name == "tflop" else ",.0f")
            spread = f" ± {values.std(ddof=1):{digits}}" if len(values) > 1 else ""
            row.append(f"{values.mean():{digits}}{spread}")
        for baseline in baselines:
            if result.pairs_with(baseline):
                mean, low, high = paired_difference(result, baseline)
                row.append(f"{mean:+.1%} [{low:+.1%}, {high:+.1%}]")
            else:
                row.append("")
        rows.append(row)
    return heading, rows


def write_results(results: Sequence[Result], out: Path) -> list[Path]:
    """Save the comparison as Markdown, CSV (one row a run) and JSON."""
    out.mkdir(parents=True, exist_ok=True)
    heading, rows = table(results)
    markdown = ["| " + " | ".join(r) + " |" for r in (heading, ["---"] * len(heading), *rows)]
    files = [out / f"compare.{kind}" for kind in ("md", "csv", "json")]
    files[0].write_text("\n".join(markdown) + "\n", encoding="utf-8")
    with files[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rule", "seed", *MEASURES])
        for result in results:
            for i, seed in enumerate(result.seeds):
                writer.writerow([result.label, seed, *(result.measures[name][i] for name in MEASURES)])
    document = {
        result.label: {
            "seeds": list(result.seeds),
            **{name: values.tolist() for name, values in result.measures.items()},
            "avg_at_k_minus": {
                b.label: dict(zip(("mean", "low", "high"), paired_difference(result, b), strict=True))
                for b in results
                if b.label in BASELINES and result.pairs_with(b)
            },
        }
        for result in results
    }
    files[2].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return files
