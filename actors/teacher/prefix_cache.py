"""What an engine's prefix cache saves, seen from outside: tokens asked for, tokens run, tokens to hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

WINDOW = 10_000  # tokens asked for between two looks
BAD = 1.5  # tokens run for each token asked for; chunks that end where blocks do cost 1 + 1 / block


@dataclass
class PrefixCacheWatch:
    """Says once each that the live rollouts exceed the cache, and that tokens are run again."""

    capacity: int  # tokens that the cache holds
    block: int  # tokens of a block

    def __post_init__(self) -> None:
        self._asked = self._run = 0
        self._said: set[str] = set()

    def observe(self, asked: int, run: int, live: int) -> Iterator[str]:
        """Take a chunk's tokens, and the tokens of all live rollouts after it; the warnings that follow."""
        if live > self.capacity and self._first("capacity"):
            yield (
                f"live rollouts have {live:,} tokens, and the teacher's KV cache holds {self.capacity:,}: what "
                "does not fit is run again whole with every chunk; raise scorer.gpu_memory_utilization, "
                "scorer.replicas or scorer.tensor_parallel_size (with num_gpus), or lower rollout.prompts_per_step"
            )
        self._asked, self._run = self._asked + asked, self._run + run
        if self._asked < WINDOW:
            return
        ratio, self._asked, self._run = self._run / self._asked, 0, 0
        if ratio > BAD and self._first("ratio"):
            yield (
                f"the teacher ran {ratio:.1f} tokens for each that it was asked for (scorer/run_per_token): its "
                f"prefix cache, {self.capacity:,} tokens in blocks of {self.block}, does not keep the rollouts; it "
                "is too small (scorer.gpu_memory_utilization, scorer.replicas), or scorer.cache_block is another"
            )

    def _first(self, what: str) -> bool:
        new = what not in self._said
        self._said.add(what)
        return new
