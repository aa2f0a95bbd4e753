"""Problems that are made and not read: the section `environment`."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import Field, model_validator

from kat_ray.config.cluster import Resumable, Section
from kat_ray.rewards.extraction import Reading
from kat_ray.rewards.problems import COMPOSITE, UNSAFE, Problem

PREFIX = "environment:"  # how `data.path` names a split
SPLITS = ("train", "heldout")
_QUESTION = "{question}"


class FamilyConfig(Section):
    """One family of problems."""

    weight: float = Field(1.0, gt=0)
    """Its share of the problems, relative to those of the others."""
    settings: dict[str, Any] = Field({})
    """The family's own settings, such as {min_terms: 2, max_terms: 3}; what is left out has its default."""


class CurriculumConfig(Section):
    """Problems that become harder as the student answers them: the curricula that reasoning-gym's families have."""

    levels: int = Field(ge=2)
    """Levels that are made of each family, from its easiest on; each has environment.train problems."""
    window: int = Field(256, ge=1)
    """Answers to a family's problems after which its level is looked at, and the count begins anew."""
    success_threshold: float = Field(0.7, gt=0, le=1)
    """Share of right answers from which on a family goes one level up; it stays at the last."""
    failure_threshold: float | None = Field(None, ge=0, lt=1)
    """Share of right answers up to which it goes one level down; null never does."""

    @model_validator(mode="after")
    def _goes_one_way(self) -> CurriculumConfig:
        down = self.failure_threshold
        if down is not None and down >= self.success_threshold:
            raise ValueError(
                f"failure_threshold = {down:g}: must be below success_threshold = {self.success_threshold:g}"
            )
        return self


class EnvironmentConfig(Section):
    """Problems that are made at the start and graded by what made them: environment:train and environment:heldout
    as data.path (docs/rl.md).
    """

    type: Literal["reasoning_gym"] = "reasoning_gym"
    """What makes problems: reasoning-gym (pip install 'kat-ray[reasoning-gym]'), 105 families."""
    families: dict[str, FamilyConfig] = Field(min_length=1)
    """Families by name, such as {chain_sum: {settings: {max_terms: 3}}, gcd: {weight: 2}}. `settings` are the
    family's own; `weight` is its share of the problems, relative to those of the others (1)."""
    curriculum: CurriculumConfig | None = None
    """Makes each family in several levels, and moves from one to the next in training (docs/rl.md); null has one,
    of `settings`. Held-out problems are of all levels, in equal numbers."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seeds the problems. `run.seed` does not: runs that differ in it alone have the same ones."""
    train: int = Field(2000, ge=1)
    """Problems of environment:train."""
    heldout: int = Field(200, ge=1)
    """Problems of environment:heldout; none of them is in environment:train."""
    prompt: str = _QUESTION
    """What the model is asked: a text with the question in the place of {question}, such as "{question}\\nAnswer:".
    A chat template is put around it."""
    answer: Reading = "stated"
    """Where the answer stands in a text. `tags`: in the last <answer>...</answer>; `stated`: there, or in the last
    \\boxed{...}, or after the last "answer is", "answer:" or "####", or else on the last line; `first_line`: in the
    tags, or else on the first line."""
    binarise: bool = True
    """A score below 1 is a reward of 0. Off: it is the reward, and families give parts of 1 for what is not right;
    right is 1 alone, either way."""
    allow_unsafe: tuple[str, ...] = ()
    """Families that are used although their scorers run the answer as code. Graded in a child process, as all are;
    that is no sandbox: code in an answer can do what you can."""
    seconds: Resumable[float] = Field(300.0, gt=0)
    """Seconds that making the problems may take."""
    memory_gib: Resumable[float] = Field(2.0, ge=0.5)
    """Memory of the process that makes them, GiB. Those that grade have evaluation.grading_memory_gib."""

    @model_validator(mode="after")
    def _families_are_safe(self) -> EnvironmentConfig:
        if COMPOSITE in self.families:
            raise ValueError(f"families.{COMPOSITE}: is a mixture of families; name those, with a weight each")
        for name in self.families:
            if name in UNSAFE and name not in self.allow_unsafe:
                raise ValueError(
                    f"families.{name}: its scorer runs the answer as code ({UNSAFE[name]}), and so whatever the "
                    f"model writes, as you; environment.allow_unsafe = [{name}] takes that risk"
                )
        for name in self.allow_unsafe:
            if name not in UNSAFE:
                raise ValueError(
                    f"allow_unsafe = {name!r}: must be among {', '.join(UNSAFE)}; others need no leave"
                )
        return self

    @model_validator(mode="after")
    def _prompt_asks(self) -> EnvironmentConfig:
        if _QUESTION not in self.prompt:
            raise ValueError(f"prompt = {self.prompt!r}: must hold {_QUESTION}, where the question is put")
        for name, family in self.families.items():
            for taken in ("seed", "size"):
                if taken in family.settings:
                    raise ValueError(
                        f"families.{name}.settings.{taken}: is set by the run itself (environment.seed, "
                        "environment.train and environment.heldout)"
                    )
        return self

    def asked(self, question: str) -> str:
        """The prompt of a question."""
        return self.prompt.replace(_QUESTION, question)

    def counts(self, split: str) -> dict[str, int]:
        """Problems of each family in a split: in proportion to the weights, the largest remainders rounded up."""
        total = self.train if split == "train" else self.heldout
        whole = sum(family.weight for family in self.families.values())
        shares = {name: total * family.weight / whole for name, family in self.families.items()}
        found = {name: int(share) for name, share in shares.items()}
        by_remainder = sorted(shares, key=lambda name: found[name] - shares[name])
        for name in by_remainder[: total - sum(found.values())]:
            found[name] += 1
        return found

    def heldout_of(self, name: str, level: int) -> int:
        """Problems of a family's level in environment:heldout; without a curriculum there is level 0 alone."""
        whole, levels = self.counts("heldout")[name], 1 if self.curriculum is None else self.curriculum.levels
        return whole // levels + (level < whole % levels)

    def first(self, name: str, level: int = 0) -> Problem:
        """The first problem of a family's level; the others of it differ from it in `index` alone.

        The settings of a level are not known here: its `settings` are the configuration's.

        reasoning-gym makes a problem from the sum of seed and index. So each family has a seed of its own, far from
        those of another `seed`: they would be the same problems, some places on.
        """
        named = f"{self.seed}:{name}:{level}" if level else f"{self.seed}:{name}"
        digest = hashlib.sha256(named.encode()).digest()
        family, needed = self.families[name], self.counts("train")[name] + self.counts("heldout")[name]
        return Problem(
            family=name,
            settings=family.settings,
            seed=int.from_bytes(digest[:4], "big") >> 1,
            size=4 * needed + 200,
            index=0,
            reading=self.answer,
            partial=not self.binarise,
            unsafe=name in self.allow_unsafe,
        )


def is_environment(path: str) -> bool:
    """Whether `data.path` names a split of the environment."""
    return path.startswith(PREFIX)


def unused_environment(environment: EnvironmentConfig | None, train: str) -> str | None:
    """What to say of an environment whose problems no step asks; `train` is `data.path`."""
    if environment is None or is_environment(train):
        return None
    return (
        f"environment: no step asks its problems, since data.path = {train!r}; name data.path = {PREFIX}train, or "
        "leave the section out"
    )


def check_environment(
    environment: EnvironmentConfig | None, verifier: str, train: str, heldout: str | None
) -> None:
    """`ValueError` unless all prompts and their grading come from the environment, or none of them.

    `train` and `heldout` are the paths of the data.
    """
    paths = {"data.path": train} | ({} if heldout is None else {"evaluation.data.path": heldout})
    of_it = [field for field, path in paths.items() if is_environment(path)]
    for field in of_it:
        if paths[field].removeprefix(PREFIX) not in SPLITS:
            raise ValueError(f"{field} = {paths[field]!r}: must be {' or '.join(PREFIX + s for s in SPLITS)}")
    if of_it and environment is None:
        raise ValueError(
            f"{of_it[0]} = {paths[of_it[0]]!r}: needs the section environment, such as "
            "environment.families={chain_sum: {}}"
        )
    if verifier == "environment" and len(of_it) < len(paths):
        (other, *_) = (field for field in paths if field not in of_it)
        raise ValueError(
            f"evaluation.verifier = 'environment': grades problems of the environment alone, and {other} = "
            f"{paths[other]!r} is none; use {' or '.join(PREFIX + s for s in SPLITS)}"
        )
    if of_it and verifier != "environment":
        raise ValueError(
            f"{of_it[0]} = {paths[of_it[0]]!r}: needs evaluation.verifier = 'environment' (it is {verifier!r}), "
            "which grades by what made the problems"
        )
