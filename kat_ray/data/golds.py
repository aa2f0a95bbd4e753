"""Gold answers of training data: which of them a rollout can be graded by."""

from __future__ import annotations

from dataclasses import dataclass

from kat_ray.config import DataConfig
from kat_ray.data.prompts import PromptSet
from kat_ray.errors import DataError
from kat_ray.rewards.limits import GradingLimits
from kat_ray.rewards.verifiers import Verifier, unmatchable


@dataclass(frozen=True)
class TrainingGolds:
    """Which prompts have a gold answer that a rollout can be graded by."""

    answers: dict[str, str]  # by prompt id, as `Prompt.gold`
    note: str | None  # of those that are left out


def training_golds(
    data: DataConfig,
    found: PromptSet,
    verifier: Verifier,
    limits: GradingLimits | None = None,
    *,
    rewards_need_them: bool = True,
) -> TrainingGolds:
    """The usable gold answers of `found`, read as `data` says.

    Training needs none: in the default column those that no answer could match are left out with a note. Of a
    column that was chosen they are a `DataError`, which names the first. Where `rewards_need_them` is false,
    rewards come from functions that make of an answer what they like, and nothing is said.
    """
    answered = [p for p in found.prompts if p.answer is not None]
    wrong = unmatchable(answered, verifier, limits)
    answers = {p.prompt_id: p.gold for p in answered if p not in wrong and p.gold is not None}
    if not wrong:
        return TrainingGolds(answers, None)
    first, reason = next(iter(wrong.items()))
    share = f"{len(wrong)} of {len(answered)} gold answers can match no answer"
    said = f"{share}; first of problem {first.prompt_id}: {reason}"
    if not rewards_need_them:
        return TrainingGolds(answers, None)
    if data.names_answers:
        raise DataError(f"{found.source}: {said} (data.answer_column = null grades no rollouts)")
    return TrainingGolds(answers, f"{found.source}: {said}. Their rollouts are not graded")
