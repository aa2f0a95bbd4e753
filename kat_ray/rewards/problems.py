"""Problems of an environment: how a row of the data names one, and families that are not for everybody.

A family of reasoning-gym makes each of its problems from a seed and an index, and scores answers with code of its
own. Problems are kept by what makes them, not as they were made: what a scorer needs of them JSON need not hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from kat_ray.rewards.extraction import Reading

VERSION = "0.1.25"  # of reasoning-gym; the lists below are read off its sources, and a test reads them again

# Families whose scorer evaluates what the model wrote: whoever can write an answer can run code.
UNSAFE = {
    "binary_matrix": "eval",
    "countdown": "parse_expr of sympy, which is eval",
    "intermediate_integration": "parse_expr of sympy, which is eval",
    "n_queens": "eval",
    "polynomial_multiplication": "parse_expr of sympy, which is eval",
    "puzzle24": "parse_expr of sympy, which is eval",
    "simple_integration": "parse_expr of sympy, which is eval",
    "spiral_matrix": "eval",
    "string_insertion": "eval",
}
# Families whose scorer evaluates text of its own problem, never of the answer.
EVALUATES_ITS_OWN = ("bitwise_arithmetic", "number_sorting")
COMPOSITE = "composite"  # a mixture of families in one; ours is `environment.families`, where each is looked at


@dataclass(frozen=True)
class Problem:
    """One problem of a family, by what makes it, and how an answer to it is graded."""

    family: str
    settings: Mapping[str, Any]
    seed: int  # of the family's problems, from which each one's is made with `index`
    size: int  # of the family's problems; some are made together
    index: int
    reading: Reading
    partial: bool  # scores below 1 count as they are, and are not 0
    unsafe: bool  # the scorer may evaluate the answer

    def at(self, index: int) -> Problem:
        """Another problem of the family."""
        return replace(self, index=index)

    def to_json(self) -> str:
        """As a row of the data holds it: the same text for the same problem."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """What `to_json` gave."""
        return cls(**json.loads(text))
