"""The self-test of a run: whether samplers, learner and scorers compute the same two models.

    samplers                                learner                                  scorers
    answer the probes, as loaded       =    plain forward pass                       score them in pieces
    with changed weights published     =    plain forward pass, changed              =
    with the weights published         =    plain forward pass  =  a step's own      plain forward pass

The changed weights are there since a publication that does nothing would pass with the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from actors.cluster.handles import Handle, R, Ref, remote
from actors.cluster.run_actors import RunActors
from actors.driver.preparation import Prepared
from actors.learner.learner import Learner
from actors.sampler.student_sampler import StudentSampler
from actors.teacher.scorer import TeacherScorer
from kat_ray.agreement.compare import AgreementError, Difference, difference, require
from kat_ray.agreement.probes import ANSWER_TOKENS, Probe, probes
from kat_ray.config import Config
from kat_ray.models.tolerance import LogprobDifference, logprob_tolerance
from kat_ray.types.records import FloatArray, SampleCheck

Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]  # prompt and answer, token ids

_WHAT = "the agreement check"
_SCALE, _LARGEST_SCALE = 2.0**-6, 0.5  # of the changed weights
_VISIBLE = 4.0  # times the tolerance, which a change must exceed to show that it arrived

_SAMPLER = (
    "vLLM and transformers compute this model differently (docs/models.md says which families agree): try "
    "student.dtype = float32, another student, or report it"
)
_PUBLISHED = "vLLM does not take this model's weights in place; take another student (docs/models.md), or report it"
_LEARNER = (
    "Training would be on other probabilities than the model's: try learner.dtype = float32, another student, or "
    "report it"
)
_SCORER = (
    "The teacher's scores would be wrong: try teacher.dtype = float32, the other scorer.backend, another teacher "
    "(docs/models.md), or report it"
)


@dataclass(frozen=True)
class Agreement:
    """What a comparison of two sides gave, both named in words."""

    ours: str
    theirs: str
    difference: Difference
    tolerance: LogprobDifference


@dataclass
class AgreementCheck:
    """Compares the engines of a run that is ready to train; nothing of it is left in them."""

    config: Config
    prepared: Prepared
    actors: RunActors
    found: list[Agreement] = field(default_factory=list)
    _known: dict[tuple[tuple[int, ...], tuple[int, ...]], FloatArray] = field(default_factory=dict)

    def run(self, version: int) -> list[Agreement]:
        """All comparisons; `AgreementError` for the first that fails.

        `version` is that of the weights the learner holds, which the samplers hold afterwards too.
        """
        self.found = []
        self._known.clear()
        asked = self._probes()
        if self.actors.samplers.weights is None:  # none were published yet
            self._compare_samplers(asked, "as loaded", _SAMPLER)
        self._publish_changed(asked, version)
        self.actors.publish(version)
        answers = self._compare_samplers(asked, "after the weights were published", _PUBLISHED)
        self._compare_learner(asked, answers)
        self._compare_scorers(asked, answers)
        return self.found

    def summary(self) -> str:
        """One line of what was found."""
        worst = max(self.found, key=lambda a: a.difference.mean / a.tolerance.mean)
        return (
            f"agreement: {len(self.found)} comparisons of log-probabilities hold; the widest, {worst.ours} and "
            f"{worst.theirs}: {worst.difference}"
        )

    def _probes(self) -> list[Probe]:
        facts, paths = self.prepared.facts, self.prepared.paths
        models = facts.models.values()
        edges = {name: edge for model in models for name, edge in model.edges.items()}
        longest = max(1, paths.max_model_len - self._answer_tokens)
        prompts = [prompt.token_ids for prompt in self.prepared.train.prompts]
        vocabulary = min(len(facts.tokenizer), *(model.vocabulary for model in models))
        return probes(prompts, vocabulary, longest, edges, self.config.run.seed)

    @property
    def _answer_tokens(self) -> int:
        return max(1, min(ANSWER_TOKENS, self.prepared.paths.max_model_len - 1))

    # --- the student ------------------------------------------------------------------------------------------

    def _compare_samplers(self, asked: Sequence[Probe], when: str, advice: str) -> list[list[int]]:
        """Every sampler's own answers, all together and the first alone; returns those of the first sampler."""
        first: list[list[int]] = []
        for group, beside in ((asked, ""), (asked[:1], ", alone")):
            prompts = [list(probe.prompt_ids) for probe in group]
            request = partial(_answer, prompts, self._answer_tokens, self.config.run.seed)
            kinds = [probe.kind + beside for probe in group]
            for replica, checked in self.actors.samplers.by_replica(request, _WHAT).items():
                answers = [c.token_ids.tolist() for c in checked]
                plain = self._plain(list(zip(prompts, answers, strict=True)))
                own, ours = [c.logprobs for c in checked], f"{replica.name} {when}"
                self._compare(ours, "the learner's plain forward pass", kinds, own, plain, advice)
                first = first or answers
        return first

    def _publish_changed(self, asked: Sequence[Probe], version: int) -> None:
        """Weights that are a little different, which the samplers must then hold."""
        try:
            self._change(asked)
            self.actors.publish(version)
            self._compare_samplers(asked, "after changed weights were published", _PUBLISHED)
        finally:
            self._change_weights(0.0)

    def _change(self, asked: Sequence[Probe]) -> None:
        """Change the learner's weights by so much that samplers which keep the old ones are found out."""
        pairs = [(list(p.prompt_ids), [1] * self._answer_tokens) for p in asked[:2]]
        before = self._plain(pairs)
        kinds, scale, visible = [p.kind for p in asked[:2]], _SCALE, _VISIBLE * self._tolerance().mean
        while True:
            self._change_weights(scale)
            moved = difference(kinds, before, self._plain(pairs))
            if moved.mean > visible or scale >= _LARGEST_SCALE:
                break
            scale *= 2
        if not moved.mean > visible:
            raise AgreementError(
                f"the student's log-probabilities move by {moved} where its weights change by {scale:g} of their "
                "size: whether samplers take new weights cannot be seen. Are the weights of student.path = "
                f"{self.config.student.path!r} those of a trained model? run.check_agreement = false goes on "
                "all the same"
            )

    def _compare_learner(self, asked: Sequence[Probe], answers: Sequence[Sequence[int]]) -> None:
        pairs = [(list(p.prompt_ids), list(a)) for p, a in zip(asked, answers, strict=True)]
        own = self._on_ranks(lambda rank: remote(rank, Learner.logprobs)(pairs, False))
        learner = self.config.learner.dtype
        self._compare(
            "the learner's training path", "its plain forward pass", [p.kind for p in asked], own,
            self._plain(pairs),
            _LEARNER,
            logprob_tolerance(learner, learner),
        )  # fmt: skip

    # --- the teacher ------------------------------------------------------------------------------------------

    def _compare_scorers(self, asked: Sequence[Probe], answers: Sequence[Sequence[int]]) -> None:
        pairs = [(list(p.prompt_ids), list(a)) for p, a in zip(asked, answers, strict=True)]
        for asked_of in self.config.scorer_groups:
            scorers = self.actors.teachers[asked_of.name]
            allowed = logprob_tolerance(asked_of.model.dtype, asked_of.model.dtype)
            own, plain = (scorers.by_replica(partial(_score, pairs, plain), _WHAT) for plain in (False, True))
            for replica, theirs in plain.items():  # one that was dropped before is not among them
                self._compare(
                    f"{replica.name} in pieces", "its plain forward pass", [p.kind for p in asked], own[replica],
                    theirs, _SCORER, allowed,
                )  # fmt: skip

    # --- both -------------------------------------------------------------------------------------------------

    def _tolerance(self) -> LogprobDifference:
        return logprob_tolerance(self.config.student.dtype, self.config.learner.dtype)

    def _compare(
        self, ours: str, theirs: str, kinds: Sequence[str], a: Sequence[FloatArray], b: Sequence[FloatArray],
        advice: str, allowed: LogprobDifference | None = None,
    ) -> None:  # fmt: skip
        allowed = allowed or self._tolerance()
        found = Agreement(ours, theirs, difference(kinds, a, b), allowed)
        self.found.append(found)
        require(found.difference, allowed, ours, theirs, advice)

    def _plain(self, pairs: Pairs) -> list[FloatArray]:
        """The learner's plain forward passes; each once for the weights it holds."""
        keys = [(tuple(prompt), tuple(answer)) for prompt, answer in pairs]
        if new := [key for key in dict.fromkeys(keys) if key not in self._known]:
            found = self._on_ranks(lambda rank: remote(rank, Learner.logprobs)(new, True))
            self._known |= dict(zip(new, found, strict=True))
        return [self._known[key] for key in keys]

    def _change_weights(self, scale: float) -> None:
        self._known.clear()
        self._on_ranks(lambda rank: remote(rank, Learner.change_weights)(scale))

    def _on_ranks(self, request: Callable[[Handle[Learner]], Ref[R]]) -> R:
        """The first rank's answer; all ranks are asked."""
        return self.actors.learners.on_all(request, _WHAT)[0]


def _answer(
    prompts: Sequence[Sequence[int]], tokens: int, seed: int, sampler: Handle[StudentSampler]
) -> Ref[list[SampleCheck]]:
    return remote(sampler, StudentSampler.check)(prompts, tokens, seed)


def _score(pairs: Pairs, plain: bool, scorer: Handle[TeacherScorer]) -> Ref[list[FloatArray]]:
    return remote(scorer, TeacherScorer.logprobs)(pairs, plain)
