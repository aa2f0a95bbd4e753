"""What the runs of a comparison left: measures, verdicts, and in what they differ beside the rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from kat_ray.analysis.compare import ALONG_THE_WAY, Arm, differences, flatten
from kat_ray.analysis.compare_curves import Curve, curve_of
from kat_ray.config import Config
from kat_ray.config.load import load_config, resolve_path
from kat_ray.errors import UserError
from kat_ray.records.json_records import EVALUATION, METRICS, SUMMARY, read_json, read_json_lines
from kat_ray.types.records import FloatArray

_FIELDS_IN_A_LABEL = 3  # where runs of one rule differ in more, a folder tells them apart
# Of the table, in its order.
MEASURES = {
    "avg_at_k": "avg@k",
    "pass_at_k": "pass@k",
    "mean_length": "kept tokens / rollout",
    "generated_tokens": "generated tokens",
    "scored_tokens": "scored tokens",
    "trained_tokens": "trained tokens",
    "overshoot_tokens": "overshoot tokens",
    "tflop": "TFLOP",
    "training_seconds": "training seconds",
}
# Beside them in CSV and JSON.
PARTS = ("tflop_sampling", "tflop_scoring", "tflop_learning", "wall_seconds")
_BOOKS = (
    "rollouts_started", "prompt_tokens", "generated_tokens", "kept_tokens", "scored_tokens", "trained_tokens",
    "overshoot_tokens", "wall_seconds", "eval_after", "parameters",
)  # fmt: skip

MEANING = (
    "Tokens are sums over a run; kept tokens / rollout is over all rollouts, including probes, which are never "
    "cut. TFLOP: 2 per parameter and token forward, 6 with the backward pass (4 where adapters are trained, which "
    "are not counted themselves). Student sampling: prompts and generated tokens; teacher scoring: prompts and "
    "scored tokens; learning: prompts and kept tokens, with rewards up to where a cut was confirmed, and 2 more "
    "for losses that need a pass without gradient first. Attention over the past, padding and evaluation are left "
    "out. Training seconds are the sum of the steps' durations, without start, loading and evaluation, on the "
    "machine as it was: compare them only where it was idle."
)


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """One run: configuration, summary, measures by name, and right answers [problems] as shares of k.

    `curve` is None where the run was not evaluated along the way, or its records do not say how.
    """

    path: Path
    config: Config
    summary: Mapping[str, Any]
    measures: Mapping[str, float]
    right: FloatArray
    notes: tuple[str, ...] = ()
    curve: Curve | None = None

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @cached_property
    def problems(self) -> Mapping[str, Any]:
        """What decides which problems were asked, and how they were answered and graded."""
        evaluation = self.config.evaluation.model_dump(exclude={*ALONG_THE_WAY, "teacher"})
        data = evaluation.pop("data") or {}
        data.pop("shuffle", None)  # of training data only
        if (path := resolve_path(data["path"])).exists():
            data["path"] = str(path.resolve())
        return {**evaluation, **data, "max_tokens": self.config.eval_max_tokens}


@dataclass(frozen=True, eq=False)
class Result:
    """One arm: its runs, one a seed, by ascending seed."""

    label: str
    runs: tuple[FinishedRun, ...]

    @property
    def rule(self) -> str:
        """The name of its rule."""
        return self.runs[0].config.termination.rule

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(run.path for run in self.runs)

    @property
    def k(self) -> int:
        """Answers to each problem."""
        return self.runs[0].config.evaluation.k

    def measure(self, name: str) -> FloatArray:
        """A measure of every run, [seeds]; NaN where it is not known."""
        return np.array([run.measures[name] for run in self.runs], dtype=float)

    def pairs_with(self, other: Result) -> list[tuple[FinishedRun, FinishedRun]]:
        """Runs of both with the same seed and the same held-out problems."""
        by_seed = {run.seed: run for run in other.runs}
        pairs = [(run, by_seed[run.seed]) for run in self.runs if run.seed in by_seed]
        if self is other or any(a.problems != b.problems or len(a.right) != len(b.right) for a, b in pairs):
            return []
        return pairs


def read_results(arms: Sequence[Arm], seeds: Sequence[int], out: Path) -> list[Result]:
    """What the finished runs of a comparison left."""
    return [Result(a.label, tuple(read_finished(out / a.label / f"seed-{s}") for s in sorted(seeds))) for a in arms]


def read_runs(paths: Sequence[Path]) -> tuple[list[Result], list[str]]:
    """Arms from any finished runs, and notes on what they differ in beside what the arms are called by.

    An arm's runs have one rule and one configuration, and a seed each.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("--runs: the same run is named twice")
    runs = [read_finished(path) for path in paths]
    by_rule: dict[str, list[FinishedRun]] = {}
    for run in runs:
        by_rule.setdefault(_label_of(run.config, [r.config for r in runs]), []).append(run)
    results, shown = [], dict[Path, set[str]]()
    for label, same in by_rule.items():
        varying = _varying([run.config for run in same])
        named = set(varying) if len(varying) <= _FIELDS_IN_A_LABEL else set()
        shown |= {run.path: named for run in same}
        results += [Result(name, tuple(sorted(g, key=lambda r: r.seed))) for name, g in _arms(label, same, varying)]
    notes = []
    for run in runs[1:]:
        said = tuple(f"{field}:" for field in shown[run.path] | shown[runs[0].path])
        if more := [d for d in _differs(run.config, runs[0].config) if not d.startswith(said)]:
            notes.append(f"{run.path} differs from {runs[0].path} in more than the rule: {'; '.join(more)}")
    return results, notes


def _varying(configs: Sequence[Config]) -> list[str]:
    """Fields beside rule and seed in which some of these differ."""
    return sorted({d.partition(":")[0] for config in configs[1:] for d in _differs(config, configs[0])})


def _arms(
    label: str, runs: Sequence[FinishedRun], varying: Sequence[str]
) -> Iterator[tuple[str, list[FinishedRun]]]:
    """Runs of one rule by their values of the fields that vary; a second one of a seed is an arm of its own."""
    arms: dict[tuple[tuple[str, ...], int], list[FinishedRun]] = {}
    for run in runs:
        flat = flatten(run.config.model_dump(mode="json"))
        values = tuple(str(flat.get(field)) for field in varying)
        number = next(n for n in count() if all(r.seed != run.seed for r in arms.get((values, n), ())))
        arms.setdefault((values, number), []).append(run)
    for (values, number), group in arms.items():
        if len(varying) > _FIELDS_IN_A_LABEL or number:
            yield f"{label} ({group[0].path})", group
        else:
            yield "-".join([label, *map("{}={}".format, _short(varying), values)]), group


def _short(fields: Sequence[str]) -> list[str]:
    """The last part of each field's name, where no other has the same."""
    last = [field.rpartition(".")[2] for field in fields]
    return [name if last.count(name) == 1 else field for name, field in zip(last, fields, strict=True)]


def _differs(one: Config, other: Config) -> list[str]:
    """What differs beside rule, seed, where the records go, and how often a run is looked at."""
    aside = ("termination.", "run.", *(f"evaluation.{name}:" for name in ALONG_THE_WAY))
    return [d for d in differences(one, other) if not d.startswith(aside) or d.startswith("run.steps:")]


def _label_of(config: Config, all_configs: Sequence[Config]) -> str:
    """The rule's name, with the fields in which runs of this rule differ; the run that is copied does not count."""
    same = [c.termination for c in all_configs if c.termination.rule == config.termination.rule]
    own = config.termination.model_dump(exclude={"rule", "run"})
    differing = [k for k, v in own.items() if any(getattr(t, k) != v for t in same)]
    return "-".join([config.termination.rule, *(f"{k}={own[k]}" for k in differing)])


# --- one run -----------------------------------------------------------------------------------------------


def read_finished(folder: Path) -> FinishedRun:
    """A finished run; `UserError` names the file where a record is missing or damaged."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no config.yaml in it; name run directories")
    file = folder / "summary.json"
    if not file.is_file():
        raise UserError(f"{folder}: no summary.json in it: not a run directory, or its run has not ended")
    summary = read_json(file, SUMMARY)
    if missing := [name for name in _BOOKS if name not in summary]:
        raise UserError(f"{file}: {', '.join(missing)} are missing: it was written by another version of kat-ray")
    config = load_config(folder / "config.yaml")
    if summary["eval_after"] is None or config.evaluation.data is None:
        raise UserError(f"{folder}: it was not evaluated; a comparison needs held-out problems")
    seconds, notes = _training_seconds(folder, config.run.steps)
    measures = _measures(summary, file, config) | {"training_seconds": seconds}
    evaluations = folder / "evaluations.jsonl"
    lines, damage = read_json_lines(evaluations, EVALUATION)
    if damage:
        raise UserError(damage[0])
    right = _right(evaluations, lines, summary)
    parameters = {"parameters": summary["parameters"]}
    curve, trouble = curve_of(lines, lambda line: sum(tflop_parts({**line, **parameters}, file, config).values()))
    if trouble is not None:
        notes = (*notes, f"{evaluations}: {trouble}; the run is left out at equal cost")
    return FinishedRun(folder, config, summary, measures, right, notes, curve)


def _measures(summary: Mapping[str, Any], file: Path, config: Config) -> dict[str, float]:
    evaluation, parts = summary["eval_after"], tflop_parts(summary, file, config)
    books = {name: float(summary[name]) for name in (*MEASURES, *PARTS) if name in summary}
    return books | {
        "avg_at_k": evaluation["avg_at_k"],
        "pass_at_k": evaluation["pass_at_k"],
        "mean_length": summary["kept_tokens"] / summary["rollouts_started"],
        **parts,
        "tflop": sum(parts.values()),
    }


def tflop_parts(summary: Mapping[str, Any], file: Path, config: Config) -> dict[str, float]:
    """Arithmetic of a run in TFLOP, as `MEANING` says.

    The learner's forward pass takes all that it was handed, also tokens of weight 0, which are not trained on. An
    earlier version did not record how many those were.
    """
    student = summary["parameters"].get("student")
    prompts, learnt = summary["prompt_tokens"], summary.get("learnt_tokens")
    completions = summary.get("given_tokens", 0) + summary.get("given_prompt_tokens", 0)  # learnt, not generated
    asked = summary.get("given_scored_tokens", 0)  # within `teacher_tokens` of several teachers
    # A run without a teacher does not name one; one with several says what each of them was given.
    given = summary.get("teacher_tokens") or {"teacher": prompts + summary["scored_tokens"] + asked}
    teachers = {name: summary["parameters"].get(name, 0) for name in given}
    if student is None or None in teachers.values():
        sizes = " and ".join(map(str, teachers.values()))
        raise UserError(
            f"{file}: parameters of student and teacher are {student} and {sizes}: the size of a model is "
            "known only if its weights are safetensors, and a comparison counts arithmetic by it: fill them in"
        )
    learnt = summary["kept_tokens"] if learnt is None else learnt
    # Weights beside which adapters are trained have no gradients of their own.
    passes = (4 if config.learner.lora else 6) + (2 if config.objective.rl.rollout_ratio else 0)
    return {
        "tflop_sampling": 2e-12 * student * (prompts + summary["generated_tokens"]),
        "tflop_scoring": sum(2e-12 * teachers[name] * tokens for name, tokens in given.items()),
        "tflop_learning": 1e-12 * passes * student * (prompts + learnt + completions),
    }


def _training_seconds(folder: Path, steps: int) -> tuple[float, tuple[str, ...]]:
    lines, notes = read_json_lines(folder / "metrics.jsonl", METRICS)
    seconds = [line["time/step"] for line in lines if line.get("time/step") is not None]
    if len(seconds) == steps:
        return sum(seconds), tuple(notes)
    unknown = f"{folder / 'metrics.jsonl'} holds {len(seconds)} of {steps} steps: training seconds are not known"
    return math.nan, (*notes, unknown)


def _right(file: Path, lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> FloatArray:
    """Of the evaluation after training."""
    if not lines:
        raise UserError(f"{file}: is missing or empty: no verdicts to compare")
    right = np.array(lines[-1].get("right", ()), dtype=float) / lines[-1]["k"]
    if not len(right) or not math.isclose(right.mean(), summary["eval_after"]["avg_at_k"], abs_tol=1e-9):
        raise UserError(f"{file}: cut off: its last line is not the evaluation after training (summary.json)")
    return right


# --- notes -------------------------------------------------------------------------------------------------


def notes_of(results: Sequence[Result]) -> list[str]:
    """What a reader of the comparison has to know beside its figures."""
    notes = [note for result in results for run in result.runs for note in run.notes]
    return [*notes, *_different_software(results), *_different_starts(results), *_different_seeds(results)]


def _different_software(results: Sequence[Result]) -> Iterator[str]:
    runs = [run for result in results for run in result.runs]
    found = [{"git_commit": run.summary.get("git_commit"), **(run.summary.get("versions") or {})} for run in runs]
    for name in dict.fromkeys(name for versions in found for name in versions):
        by_value: dict[Any, list[str]] = {}
        for run, versions in zip(runs, found, strict=True):
            by_value.setdefault(versions.get(name), []).append(str(run.path))
        if len(by_value) > 1:
            yield f"{name} differs: " + "; ".join(f"{value} in {', '.join(p)}" for value, p in by_value.items())


def _different_starts(results: Sequence[Result]) -> Iterator[str]:
    """The students before training must have answered alike, where seed and problems are the same."""
    for seed in sorted({seed for result in results for seed in result.seeds}):
        first, *others = [(r.label, run) for r in results for run in r.runs if run.seed == seed]
        for label, run in others:
            a, b = (r.summary.get("eval_before") or {} for r in (first[1], run))
            differing = [n for n in ("avg_at_k", "pass_at_k", "mean_length") if a.get(n) != b.get(n)]
            if differing and run.problems == first[1].problems:
                figures = "; ".join(f"{n} {a.get(n)} and {b.get(n)}" for n in differing)
                yield (
                    f"seed {seed}: {first[0]} and {label} do not start alike (before training: {figures}): "
                    "different students, or engines that do not repeat their own answers"
                )


def _different_seeds(results: Sequence[Result]) -> Iterator[str]:
    if len({result.seeds for result in results}) > 1:
        seeds = "; ".join(f"{r.label} {', '.join(map(str, r.seeds))}" for r in results)
        yield f"not all rules have the same seeds ({seeds}): differences are taken over the seeds that both have"
