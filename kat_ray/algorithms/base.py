"""What the driver asks of an algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kat_ray.data.accounting import FinishedRollout
from kat_ray.types.records import KeptRollout, RolloutSpec


class Algorithm(Protocol):
    """Gives the tokens of finished rollouts their credit, before a batch is handed over to the learner.

    Its counterpart at the learner is `kat_ray.losses.term.LossTerm`, which makes a loss of credit and targets.
    """

    def credit(self, rollouts: Sequence[FinishedRollout], specs: Sequence[RolloutSpec]) -> list[KeptRollout]:
        """The learner's work list of a step, in the order of rollout ids.

        It says of whose first tokens the loss is made, and how much each weighs. `specs` are those that the step's
        rollouts were made from.
        """
