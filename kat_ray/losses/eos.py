"""What becomes of stop ids in the KL, which `divergence` computes; who only names it loads no torch."""

from typing import Literal

EosMode = Literal["raw", "merged", "mask"]
