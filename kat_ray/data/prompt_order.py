"""The order of prompts, and what of it is in a step: rollouts with their seeds, probes, given completions.

All are functions of the run's seed and of places in the order, so that a resumed run and a replay draw the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from kat_ray.config import Config
from kat_ray.config.off_policy import most_given
from kat_ray.data.given import GivenCompletion
from kat_ray.types.records import Prompt, RolloutSpec, StepStart

# Domains of the run seed: independent random streams.
_ORDER, _SAMPLING, _PROBE, _GIVEN = 1, 2, 3, 4


class PromptOrder:
    """An endless order of prompts, epoch after epoch, each a permutation drawn from (seed, epoch).

    It keeps no position: `take` is a pure function. Prompts of other levels than 0 are not in the order: they stand
    in for those of level 0 of their source, one for each as far as there are as many.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool) -> None:
        self._prompts = tuple(p for p in prompts if not p.level)
        assert self._prompts, "an order needs at least one prompt"
        self._by_level: dict[tuple[str | None, int], list[Prompt]] = {}
        self._number: dict[str, int] = {}  # of a prompt among those of its source and level
        for prompt in prompts:
            alike = self._by_level.setdefault((prompt.source, prompt.level), [])
            self._number[prompt.prompt_id] = len(alike)
            alike.append(prompt)
        self._permutation = functools.lru_cache(maxsize=2)(
            functools.partial(_permutation, len(self._prompts), seed, shuffle)
        )

    def take(self, places: range, levels: Mapping[str, int] | None = None) -> list[Prompt]:
        """The prompts at these places of the order, from 0; `levels` are by source, 0 where nothing is said."""
        size = len(self._prompts)
        first = [self._prompts[self._permutation(place // size)[place % size]] for place in places]
        return [self._at(prompt, levels.get(prompt.source or "", 0)) for prompt in first] if levels else first

    def _at(self, prompt: Prompt, level: int) -> Prompt:
        alike = self._by_level[prompt.source, level]
        return alike[self._number[prompt.prompt_id] % len(alike)]


def _permutation(size: int, seed: int, shuffle: bool, epoch: int) -> list[int]:
    if not shuffle:
        return list(range(size))
    order: list[int] = np.random.default_rng([seed, _ORDER, epoch]).permutation(size).tolist()
    return order


def rollout_specs(
    order: PromptOrder,
    config: Config,
    places: range,
    start: StepStart | None = None,
    levels: Mapping[str, int] | None = None,
    given: Collection[int] = (),
) -> list[RolloutSpec]:
    """The rollouts of the prompts at these places of the order: those of one prompt are adjacent, and ids are
    consecutive over the run, since each follows from its prompt's place, but for those of prompts whose completions
    are `given`, counted from the first place.

    Each rollout is a probe with the probability that its teacher's rule says in `start`, by default
    `termination.probe_share`, independently; a larger share only adds probes. Others are no longer than its budget.
    `levels` are those of a curriculum.
    """
    rollout, seed = config.rollout, config.run.seed
    start = start or StepStart(None, None)
    prompts, each = order.take(places, levels), rollout.rollouts_per_prompt
    first, specs = places.start * each, []
    for rollout_id, prompt in enumerate((p for p in prompts for _ in range(each)), first):
        if (rollout_id - first) // each in given:
            continue
        limits = start.of(prompt.teacher)
        probe = is_probe(seed, rollout_id, probe_share(config, limits))
        budget = None if probe else limits.budget
        specs.append(
            RolloutSpec(
                rollout_id=rollout_id,
                prompt_id=prompt.prompt_id,
                prompt_ids=prompt.token_ids,
                seed=_draw(seed, _SAMPLING, rollout_id) >> 1,  # 31 bits: a seed that every engine takes
                probe=probe,
                max_tokens=rollout.max_tokens if budget is None else max(1, min(budget, rollout.max_tokens)),
                teacher=prompt.teacher,
                context_ids=prompt.context_ids,
            )
        )
    return specs


@functools.lru_cache(maxsize=4)
def _given_places(seed: int, step: int, share: float, prompts: int) -> frozenset[int]:
    """Places of a step's prompts, drawn from (run seed, step); their mean number is share x prompts."""
    generator = np.random.default_rng([seed, _GIVEN, step])
    count = math.floor(share * prompts + generator.random())
    return frozenset(generator.permutation(prompts)[: min(count, most_given(share, prompts))].tolist())


def given_places(config: Config, step: int) -> frozenset[int]:
    """Which of a step's prompts have their completion from the data; a function of seed and step alone."""
    objective = config.objective.off_policy
    if not objective.share or (objective.steps is not None and step >= objective.steps):
        return frozenset()
    return _given_places(config.run.seed, step, objective.share, config.rollout.prompts_per_step)


def given_completions(order: PromptOrder, config: Config, step: int) -> list[GivenCompletion]:
    """The completions that a step learns from in place of rollouts, each under the id of its prompt's first one."""
    rollout = config.rollout
    begin = step * rollout.prompts_per_step  # with completions of the data no step draws other prompts
    prompts = order.take(range(begin, begin + rollout.prompts_per_step))
    first = begin * rollout.rollouts_per_prompt
    return [
        GivenCompletion(first + place * rollout.rollouts_per_prompt, prompts[place])
        for place in sorted(given_places(config, step))
    ]


def probe_share(config: Config, start: StepStart) -> float:
    """The chance with which a rollout under these limits is a probe."""
    if start.probe_share is not None:
        return start.probe_share
    return getattr(config.termination, "probe_share", 0.0)  # rule none has no probes


def is_probe(seed: int, rollout_id: int, share: float) -> bool:
    """Whether a rollout is a probe: a draw from (run seed, rollout id)."""
    return _draw(seed, _PROBE, rollout_id) < share * 2**32


def _draw(seed: int, domain: int, rollout_id: int) -> int:
    """32 random bits that depend on the three numbers only; the same on every machine."""
    return int(np.random.SeedSequence([seed, domain, rollout_id]).generate_state(1)[0])
