"""What engines are asked: few prompts, of lengths and tokens at which engines are known to differ.

Ragged, so that whoever pads or batches is seen; past each length at which a model's attention or positions change;
random tokens, which a model has not seen and no cache holds, beside prompts of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ANSWER_TOKENS = 12  # that the student adds to each probe
_SHORT = (5, 17, 33)  # tokens; none a multiple of a cache's block
_PAST = 3  # tokens behind an edge at which the answer begins


@dataclass(frozen=True)
class Probe:
    """One prompt; `kind` says in words what is special about it."""

    kind: str
    prompt_ids: tuple[int, ...]


def probes(
    prompts: Sequence[Sequence[int]], vocabulary: int, longest: int, edges: Mapping[str, int], seed: int
) -> list[Probe]:
    """Probes of at most `longest` tokens, the longest last: `prompts` are token ids of the data.

    Random ids are below `vocabulary`. Of an edge that a rollout of this run cannot reach, none.
    """
    random = np.random.default_rng(seed)

    def draw(tokens: int) -> tuple[int, ...]:
        return tuple(random.integers(0, vocabulary, tokens).tolist())

    found = [Probe(f"{n} random tokens", draw(n)) for n in _SHORT if n <= longest]
    found += [
        Probe(f"a prompt of the data, {len(ids)} tokens", tuple(ids))
        for ids in _some(prompts)
        if len(ids) <= longest
    ]
    for name, edge in sorted(edges.items(), key=lambda item: item[1]):
        length = min(edge + _PAST, longest)
        if length + ANSWER_TOKENS > edge:
            found.append(Probe(f"{length} random tokens, past {name} of {edge}", draw(length)))
    return found or [Probe(f"{longest} random tokens", draw(longest))]


def _some(prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The shortest and the longest of the first hundred."""
    if not prompts:
        return []
    ordered = sorted(prompts[:100], key=len)
    return ordered[:1] if len(ordered) == 1 else [ordered[0], ordered[-1]]
