"""Reward functions of a run: checked before it starts, and made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from kat_ray.config import Config
from kat_ray.data.golds import TrainingGolds
from kat_ray.data.prompts import PromptSet
from kat_ray.errors import DataError
from kat_ray.rewards.scoring import RewardScorer
from kat_ray.rewards.source import check_source, file_and_name


def has_functions(config: Config) -> bool:
    """Whether rewards come from functions: else from `evaluation.verifier`, or there are none."""
    return bool(config.objective.rl.weight and config.reward.functions)


def needs_golds(config: Config) -> bool:
    """Whether gold answers of training must be such as `evaluation.verifier` can use."""
    return not has_functions(config) or bool(config.reward.verifiers)


def check_golds_for_rewards(config: Config, prompts: PromptSet, golds: TrainingGolds) -> None:
    """`DataError` where no rollout could ever have a reward."""
    if config.objective.rl.weight and needs_golds(config) and not golds.answers:
        raise DataError(
            f"{prompts.source}: objective.rl.weight = {config.objective.rl.weight:g}, and no prompt has a gold "
            f"answer to grade rollouts by in column {config.data.answer_column!r} (data.answer_column chooses "
            "another; reward.functions need none)"
        )


def check_sources(config: Config) -> None:
    """`UserError` where a file of reward functions is not there, or lacks a name; none of it is run."""
    for name in config.reward.functions if has_functions(config) else ():
        if file_and_name(name) is not None:
            check_source(name)


def reward_files(config: Config) -> list[str]:
    """Files of reward functions that lie in the working directory, by their paths below it."""
    parts = [file_and_name(name) for name in config.reward.functions] if has_functions(config) else []
    paths = [PurePath(path) for path, _ in filter(None, parts)]
    return [path.as_posix() for path in paths if not path.is_absolute() and path.parts[0] not in ("..", "~")]


def file_digests(config: Config) -> dict[str, str]:
    """SHA-256 of each file of reward functions, by its path in the configuration; what it imports is not in it."""
    parts = [file_and_name(name) for name in config.reward.functions] if has_functions(config) else []
    paths = dict.fromkeys(path for path, _ in filter(None, parts))
    return {path: hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest() for path in paths}


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """What to say of files that are not those of the run so far; an older checkpoint has no digests."""
    for path, digest in now.items():
        if (then := before.get(path, digest)) != digest:
            yield (
                f"reward.functions: {path} has changed since the checkpoint (sha256 {then[:12]}, now "
                f"{digest[:12]}): the rewards from here on are those of the new one"
            )


def make_scorer(config: Config, prompts: PromptSet) -> RewardScorer | None:
    """What rewards answers to these prompts, None where no function does; `prompts` were read with their tasks."""
    return RewardScorer(config.reward.rules, prompts.tasks) if has_functions(config) else None


def try_functions(config: Config, prompts: PromptSet, encode: Callable[[str], Sequence[int]]) -> None:
    """Call each function once, in a child process; `UserError` where one cannot be loaded, or gives no reward.

    `encode` gives the token ids of an answer.
    """
    scorer = make_scorer(config, prompts)
    if scorer is not None:
        try:
            scorer.try_out(prompts.prompts[0].prompt_id, encode)
        finally:
            scorer.close()
