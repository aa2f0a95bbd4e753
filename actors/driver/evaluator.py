"""Evaluation: k answers to every held-out problem, through the samplers that also train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np

from actors.cluster.handles import Handle, Ref, remote
from actors.cluster.samplers import SamplerGroup
from actors.sampler.student_sampler import StudentSampler
from kat_ray.config import Config
from kat_ray.rewards.grader_pool import GraderPool
from kat_ray.rewards.verifiers import EvalResult, evaluate_answers
from kat_ray.types.records import Prompt, SamplingSettings


class Decoder(Protocol):
    """The part of a tokenizer that evaluation needs."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids."""


class Evaluations:
    """The held-out problems that a run is judged by, and further sets beside them."""

    def __init__(self, main: Evaluator, others: Mapping[str, Evaluator], k: int) -> None:
        """`k`: answers to each problem of `main` in a whole evaluation."""
        self._main, self._others, self._k = main, dict(others), k

    def run(self, samplers: SamplerGroup, k: int | None = None) -> EvalResult:
        """The result of the main set with those of the others in `sets`.

        With fewer than `evaluation.k` answers the others have no more than so many either; else each has its own.
        """
        result = self._main.run(samplers, k)
        most = None if k is None or k >= self._k else k
        sets = {name: other.run(samplers, other.at_most(most)) for name, other in self._others.items()}
        return replace(result, sets=sets) if sets else result


class Evaluator:
    """Holds the problems; the same seeds each time, so that two evaluations differ in the weights only.

    The seeds are drawn here, once, from the run's seed: an evaluation moves no random number of training.
    """

    def __init__(
        self, config: Config, problems: Sequence[Prompt], tokenizer: Decoder, pool: GraderPool | None = None
    ) -> None:
        """`pool`: children that grade, and stay (`pool_of`); without it each evaluation has its own."""
        self._config, self._pool = config, pool
        self._problems = tuple(problems)
        self._tokenizer = tokenizer
        shape = (len(self._problems), config.evaluation.k)
        generator = np.random.default_rng([config.run.seed, 0x6576616C])  # "eval"
        self._seeds = generator.integers(0, 2**31, size=shape)

    def at_most(self, k: int | None) -> int:
        """`evaluation.k`, or `k` where that is less."""
        own = self._config.evaluation.k
        return own if k is None else min(own, k)

    def run(self, samplers: SamplerGroup, k: int | None = None) -> EvalResult:
        """Deal k copies of every problem to the samplers and grade what comes back; None: `evaluation.k`.

        An answer ends at the stop ids of the model that the samplers hold. Fewer answers have the seeds of each
        problem's first ones.
        """
        evaluation = self._config.evaluation
        k = k or evaluation.k
        settings = SamplingSettings(
            max_tokens=self._config.eval_max_tokens,
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            logprobs=None,
            stop_ids=samplers.stop_ids,
        )
        seeds = self._seeds[:, :k].ravel().tolist()
        prompts = [p.token_ids for p in self._problems for _ in range(k)]
        n = len(samplers.replicas)

        def complete(i: int, sampler: Handle[StudentSampler]) -> Ref[list[list[int]]]:
            return remote(sampler, StudentSampler.complete)(prompts[i::n], seeds[i::n], settings, samplers.version)

        answers: list[list[int]] = [[] for _ in prompts]
        for i, part in enumerate(samplers.call(complete, "evaluation", interruptible=True)):
            answers[i::n] = part
        texts = [self._tokenizer.decode(a, skip_special_tokens=True) for a in answers]
        return evaluate_answers(
            texts,
            [p.gold for p in self._problems],
            k=k,
            lengths=[len(a) for a in answers],
            finished=[bool(a) and a[-1] in samplers.stop_ids for a in answers],
            verifier=evaluation.verifier,
            limits=evaluation.grading_limits,
            within=self._config.cluster.step_timeout,
            check=partial(samplers.supervisor.check, True),
            pool=self._pool,
        )
