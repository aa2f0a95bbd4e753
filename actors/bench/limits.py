"""What stands in the way where a goal of the benchmark is missed, said beside the figure."""

from __future__ import annotations

# By the beginning of a figure's name.
_LIMITS = (
    (
        "|step time with KAT",
        "the rule removes the ends of long rollouts, so that what is left of a step has fewer tokens in each "
        "engine step: time falls by less than tokens do (detail in benchmarks.json)",
    ),
    (
        "tokens per second, kat-ray / TRL with vLLM generation",
        "1.59, 1.39 and 1.45 in three runs of one day: the same engine generates on both sides, so that only "
        "scoring and learning can be faster, and how much they are differs with what a shared machine gives "
        "several processes or one",
    ),
    (
        "monitor plus decision path",
        "of it the monitor takes 0.4 %; the rest is the sampler's loop, 4.5 us of Python and numpy a token at "
        "a chunk every 16 tokens and 5.6 us at every 4, per-token rows of the engine joined into chunks; "
        "against a model of 0.3 M parameters a step is short",
    ),
    (
        "tiny: tokens/s, ours over bare vLLM",
        "a seed of its own for each request costs vLLM 13 % (one generator a row instead of one for the "
        "batch); without it the rest is within 5 %. It is kept: what a rollout draws must not depend on who "
        "is aborted beside it, nor on which sampler takes it over",
    ),
    (
        "tiny: seconds, incremental over one full forward",
        "attention is called rollout by rollout, and at 32 to 128 hidden units the calls are the cost, not "
        "their arithmetic: the same code takes 1.08 times with the large pair",
    ),
    (
        "replay of rule repetition",
        "0.92 in this run and 1.0 in another (docs/log.md): at the goal within this machine's noise; all "
        "periods are compared at once as arrays",
    ),
)


def limit_of(name: str) -> str:
    """Why a figure of this name may miss its goal; empty if nothing is known."""
    return next((text for beginning, text in _LIMITS if name.startswith(beginning)), "")
