"""What rollouts that were seen to their end say about the rule: what its cuts would have removed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kat_ray.data.accounting import FinishedRollout
from kat_ray.errors import DataError
from kat_ray.rewards.verifiers import Verifier, check_golds, grade
from kat_ray.termination import RULES
from kat_ray.termination.settings import RuleSettings
from kat_ray.types.records import FloatArray, Prompt, RolloutOutcome, StopReason

log = logging.getLogger("kat_ray.probes")


class RolloutGrader:
    """Grades training rollouts against the gold answers of their prompts, where there are any."""

    def __init__(
        self, prompts: Sequence[Prompt], decode: Callable[[Sequence[int]], str], verifier: Verifier
    ) -> None:
        answered = [p for p in prompts if p.answer is not None]
        try:
            check_golds(answered, verifier)
        except DataError as error:  # training needs no answers: they are only looked at here
            log.warning("training rollouts are not graded: %s", error)
            answered = []
        self._golds = {p.prompt_id: p.answer for p in answered}
        self._decode = decode
        self._verifier: Verifier = verifier

    def grade(self, rollouts: Mapping[int, tuple[str, Sequence[int]]]) -> dict[int, bool]:
        """Verdicts by rollout id, from (prompt id, token ids); rollouts without a gold answer are left out."""
        known = {i: (self._golds[p], ids) for i, (p, ids) in rollouts.items() if self._golds.get(p) is not None}
        texts = [self._decode(ids) for _, ids in known.values()]
        verdicts = grade(texts, [str(gold) for gold, _ in known.values()], self._verifier) if known else []
        return dict(zip(known, verdicts, strict=True))


def seen_to_the_end(rollouts: Sequence[FinishedRollout], cuts: bool) -> list[FinishedRollout]:
    """Rollouts that no rule touched: the probes of a rule that cuts, all of one that does not.

    A rollout that a rule let pass is not among them: those that pass are a choice of the rule's.
    """
    whole = [r for r in rollouts if r.outcome.stop_reason is not StopReason.FAILED]
    return [r for r in whole if r.outcome.probe or not cuts]


def is_active(settings: RuleSettings, threshold: float | None) -> bool:
    """Whether the rule could do anything in a step: one that calibrates a threshold must have one."""
    return threshold is not None or not RULES[settings.rule].calibrates


def probe_metrics(
    outcomes: Sequence[RolloutOutcome],
    traces: Mapping[int, FloatArray],
    correct: Mapping[int, bool],
    active: bool,
) -> dict[str, float]:
    """What the rule would have done to a step's probes, and what their continuations were worth.

    Nothing is said of a step without probes or in which the rule was not `active`; a step in which it would have
    cut no probe counts with a share of 0.
    """
    probes = [o for o in outcomes if o.probe]
    if not probes or not active:
        return {}
    cut = [(o, traces[o.rollout_id][o.would_cut :]) for o in probes if o.would_cut is not None]
    figures = {"probe/would_cut_share": len(cut) / len(probes)}
    graded = [o for o in probes if o.rollout_id in correct]
    if graded:
        figures["probe/right_share"] = sum(correct[o.rollout_id] for o in graded) / len(graded)
        false_cuts = sum(correct[o.rollout_id] and o.would_cut is not None for o in graded)
        figures["probe/false_cut_share"] = false_cuts / len(graded)
    if cut:
        figures["probe/tokens_after_cut"] = float(np.mean([len(rest) for _, rest in cut]))
        rest = np.concatenate([rest for _, rest in cut])
        if np.isfinite(rest).any():
            figures["probe/kl_after_cut"] = float(np.nanmean(rest, dtype=np.float64))
    return figures
