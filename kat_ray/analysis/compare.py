"""`kat-ray compare`: each rule from the same start, on the same prompts and seeds: what is run, and in which order.

Every (rule, seed) is a run of its own in `<out>/<rule>/seed-<n>`; one that has its summary is not run again, so an
interrupted comparison goes on where it was. What the runs left is read in compare_results, and set against each
other in compare_table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kat_ray.config import Config
from kat_ray.config.load import load_config, refuse_flags, yaml_value
from kat_ray.errors import UserError
from kat_ray.termination import RULES, Effect, RunFacts, TerminationConfig, make_rule
from kat_ray.termination.settings import KatParameters, with_threshold_of

# Fields of the evaluation that say how often a run is looked at, and not what it computes.
ALONG_THE_WAY = ("every", "every_k")


@dataclass(frozen=True)
class Arm:
    """One rule of a comparison: its label, which is also its folder, and its settings' fields.

    `of` is the label of the arm whose runs, of the same seeds, a control copies.
    """

    label: str
    rule: str
    fields: Mapping[str, Any]
    of: str | None = None


def parse_arm(text: str) -> Arm:
    """`rule` or `rule:field=value,field=value`; `length_matched:of=LABEL` copies another arm of the comparison."""
    name, _, rest = text.partition(":")
    if name not in RULES:
        raise UserError(f"--rules {text!r}: {name!r} is not a rule; the rules are {', '.join(RULES)}")
    known = [f for f in RULES[name].settings.model_fields if f != "rule"]
    if RULES[name].copies:
        known.append("of")
    fields, of = {}, None
    for part in filter(None, rest.split(",")):
        field, separator, value = part.partition("=")
        if not separator or field not in known:
            raise UserError(f"--rules {text!r}: {part!r} must be FIELD=VALUE with one of {', '.join(known)}")
        if field == "of" and RULES[name].copies:
            of = value
        else:
            fields[field] = yaml_value(value, f"--rules {text!r}")
    if of is not None and RULES[name].copies in fields:
        raise UserError(f"--rules {text!r}: `of` and `{RULES[name].copies}` both say what is copied: leave one out")
    shown = fields if of is None else {**fields, "of": of}
    label = "-".join([name, *(f"{k}={v}" for k, v in shown.items())]).replace("/", "_")
    return Arm(label, name, fields, of)


def order_of(arms: Sequence[Arm]) -> list[Arm]:
    """The arms with what each control (`length_matched`) copies, those last: they copy a finished run's lengths."""
    if len({arm.label for arm in arms}) < len(arms):
        raise UserError("--rules: the same rule is named twice")
    return sorted((_with_copied(arm, arms) for arm in arms), key=lambda a: RULES[a.rule].copies is not None)


def _with_copied(arm: Arm, arms: Sequence[Arm]) -> Arm:
    kind = RULES[arm.rule]
    if kind.copies is None or kind.copies in arm.fields:
        return arm
    by_label = {a.label: a for a in arms}
    if arm.of is None:
        kats = [a.label for a in arms if a.rule == "kat"]
        if not kats:
            raise UserError(
                f"--rules {arm.rule}: add kat, whose lengths it copies, or name a run: {arm.rule}:{kind.copies}=DIR"
            )
        if len(kats) > 1:
            raise UserError(f"--rules {arm.rule}: which one? Write {arm.rule}:of={' or :of='.join(kats)}")
        return dataclasses.replace(arm, of=kats[0])
    if arm.of not in by_label:
        raise UserError(f"--rules {arm.label}: no rule has the label {arm.of!r}; there are {', '.join(by_label)}")
    copied = RULES[by_label[arm.of].rule]
    if copied.effect is not Effect.CUTS or copied.copies:
        raise UserError(f"--rules {arm.label}: {by_label[arm.of].rule} has no cuts whose lengths could be copied")
    return arm


def config_of(base: Config, arm: Arm, seed: int, out: Path) -> Config:
    """The configuration of one run: only the rule, the seed and the folder differ from `base`.

    The rule's fields are those of `base` where it has the same rule, or one of the same family (`kat` and
    `kat_stages`); else the rule's defaults. A control that copies another arm copies its run of the same seed.
    """
    settings, copies = RULES[arm.rule].settings, RULES[arm.rule].copies
    fields: dict[str, Any] = {"rule": arm.rule}
    if isinstance(base.termination, KatParameters) and issubclass(settings, KatParameters):
        own = base.termination.model_dump(exclude={"rule"})
        fields |= {name: value for name, value in own.items() if name in settings.model_fields}
    elif base.termination.rule == arm.rule:
        fields |= base.termination.model_dump()
    if arm.of is not None and copies is not None:
        fields[copies] = str(out / arm.of / f"seed-{seed}")
    if "probe_share" not in fields and "probe_share" in settings.model_fields:
        fields["probe_share"] = getattr(base.termination, "probe_share", 0.1)  # the same share in all arms
    named = with_threshold_of(arm.fields) if issubclass(settings, KatParameters) else arm.fields
    try:
        rule = TypeAdapter(TerminationConfig).validate_python({**fields, **named})
        refuse_flags(named, rule)
    except ValidationError as error:
        raise UserError(
            f"--rules {arm.label}: {error.errors()[0]['loc'][-1]}: {error.errors()[0]['msg']}"
        ) from error
    except UserError as error:
        raise UserError(f"--rules {arm.label}: {error}") from error
    run = base.run.model_copy(
        update={"dir": str(out / arm.label), "name": f"seed-{seed}", "seed": seed, "overwrite": True}
    )
    return base.model_copy(update={"termination": rule, "run": run})


@dataclass(frozen=True)
class Planned:
    """One run of a comparison: its configuration, its directory, and whether it has been made before."""

    arm: Arm
    config: Config
    folder: Path
    done: bool

    @property
    def title(self) -> str:
        return f"{self.arm.label}, seed {self.config.run.seed}"


def evaluated_along_the_way(base: Config, every: int | None) -> Config:
    """`base` with an evaluation every so many steps; None: its own, or about ten in a run where it has none.

    Where `base` has none these have one answer to each problem, unless it says how many.
    """
    own = base.evaluation
    if every is None:
        every = own.every or max(1, round(base.run.steps / 10))
    if every == own.every:
        return base
    every_k = own.every_k if own.every or own.every_k else 1
    return base.model_copy(update={"evaluation": own.model_copy(update={"every": every, "every_k": every_k})})


def plan_runs(base: Config, arms: Sequence[Arm], seeds: Sequence[int], out: Path) -> list[Planned]:
    """Every run in its order; whatever can be wrong with one is said now, not after hours of the others."""
    planned = []
    for seed in seeds:
        for arm in order_of(arms):
            config = config_of(base, arm, seed, out)
            folder = out / arm.label / f"seed-{seed}"
            done = (folder / "summary.json").is_file()
            if done:
                check_same(config, folder)
            elif arm.of is None:  # what it copies is not there yet
                _check_rule(config, arm)
            planned.append(Planned(arm, config, folder, done))
    return planned


def _check_rule(config: Config, arm: Arm) -> None:
    try:
        make_rule(config.termination, RunFacts(config.run.seed, config.rollout.max_tokens))
    except UserError as error:
        raise UserError(f"--rules {arm.label}: {error}") from error


def run_all(planned: Sequence[Planned], train: Callable[[Config], Any], say: Callable[[str], None]) -> None:
    """Run what has no summary yet; `train` runs one configuration."""
    for number, run in enumerate(planned, 1):
        say(f"[{number}/{len(planned)}] {run.title}{': already done' if run.done else ''}")
        if not run.done:
            train(run.config)


def check_same(config: Config, folder: Path) -> None:
    """Refuse a finished run that differs from what would be run now; names the fields.

    `run.dir` does not count: it is where the run was found, however it was written then; nor do evaluations along
    the way. A run that copied another one is the same wherever both were moved together.
    """
    then = load_config(folder / "config.yaml")
    now_copies, then_copied = (getattr(c.termination, "run", None) for c in (config, then))
    if now_copies and then_copied:
        is_same = Path(now_copies).resolve() == Path(then_copied).resolve()
        if is_same or relpath(now_copies, config.run.dir) == relpath(then_copied, then.run.dir):
            then = then.model_copy(update={"termination": then.termination.model_copy(update={"run": now_copies})})
    looked_at = {name: getattr(config.evaluation, name) for name in ALONG_THE_WAY}
    then = then.model_copy(
        update={
            "run": then.run.model_copy(update={"dir": config.run.dir}),
            "evaluation": then.evaluation.model_copy(update=looked_at),
        }
    )
    if differing := differences(config, then):
        raise UserError(
            f"{folder} was run with different settings ({'; '.join(differing)}): remove it, or choose another --out"
        )


def differences(one: Config, other: Config) -> list[str]:
    """Fields that differ, as `section.field: a, was b`."""
    a, b = flatten(one.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
    return [f"{k}: {a.get(k)!r}, was {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration's values by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
