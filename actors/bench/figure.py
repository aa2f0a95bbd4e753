"""One row of the benchmark: a ratio measured in one run on one machine, with its goal and what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Figure:
    """A measured ratio. `detail` holds the raw measurements with units in their names; `note` names a limit."""

    group: str  # end_to_end, sampler, teacher, learner, memory, scaling, ...
    name: str
    value: float | None  # None: it could not be measured, and `note` says why
    goal: float | None = None
    sense: Literal[">=", "<="] = ">="
    detail: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or a value."""
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.sense == ">=" else self.value <= self.goal

    def as_dict(self) -> dict[str, Any]:
        """The figure as it stands in the JSON file."""
        return {**asdict(self), "met": self.met}
