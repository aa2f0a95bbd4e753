"""What a run reads and checks before it starts anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from actors.cluster.samplers import ModelPaths
from actors.driver.evaluator import Evaluations, Evaluator
from kat_ray.algorithms.choice import check_rule
from kat_ray.config import Config, DataConfig, RunConfig
from kat_ray.data.completions import CompletionLimits
from kat_ray.data.golds import TrainingGolds, training_golds
from kat_ray.data.prompts import PromptSet, load_prompts
from kat_ray.errors import UserError
from kat_ray.models.inspect import ModelFacts, check_models, resolve_model
from kat_ray.rewards.grader_pool import GraderPool
from kat_ray.rewards.verifiers import check_golds
from kat_ray.run.chat_facts import with_chat
from kat_ray.run.checkpoint import Checkpoints
from kat_ray.run.reward_functions import check_golds_for_rewards, file_digests, has_functions, needs_golds


@dataclass(frozen=True)
class Prepared:
    """Everything a run reads before it starts anything."""

    facts: ModelFacts
    train: PromptSet
    golds: TrainingGolds  # of `train`
    heldout: PromptSet | None
    paths: ModelPaths
    reward_files: Mapping[str, str] = field(default_factory=dict)  # digests, by path
    heldout_sets: Mapping[str, PromptSet] = field(default_factory=dict)  # of `evaluation.sets`

    def prompt_sets(self) -> dict[str, PromptSet]:
        """What the run reads prompts from, by the section of the configuration that names it."""
        sets = {"data": self.train, "evaluation.data": self.heldout}
        sets |= {f"evaluation.sets.{name}.data": prompts for name, prompts in self.heldout_sets.items()}
        return {section: prompts for section, prompts in sets.items() if prompts is not None}


def checkpoints_of(run: Path, config: RunConfig) -> Checkpoints:
    """The checkpoints in a run's directory."""
    return Checkpoints(run / "checkpoints", config.keep_checkpoints, config.keep_best)


def make_evaluator(config: Config, prepared: Prepared, pool: GraderPool | None = None) -> Evaluations | None:
    """What evaluates on the held-out problems, if there are any; `pool` as for `Evaluator`."""
    if prepared.heldout is None:
        return None
    tokenizer, parts = prepared.facts.tokenizer, {}
    for name, part in config.evaluation.parts().items():
        problems = prepared.heldout_sets.get(name.removesuffix("/greedy"), prepared.heldout).prompts
        own = pool if part.verifier == config.evaluation.verifier else None
        parts[name] = Evaluator(config.model_copy(update={"evaluation": part}), problems, tokenizer, own)
    return Evaluations(parts.pop(""), parts, config.evaluation.k)


def prepare(config: Config, ask_servers: bool = True) -> Prepared:
    """Check models and data; `UserError` names what is wrong. See `check_models` for `ask_servers`."""
    facts = with_chat(config, check_models(config, ask_servers))
    check_rule(config)
    verifier, limits = config.evaluation.verifier, config.evaluation.grading_limits
    heldout, longest = None, 0
    if config.evaluation.data is not None:  # first: of a model that is evaluated alone it stands for `data`, too
        heldout = _prompts(config, facts, config.evaluation.data, config.eval_max_tokens)
        check_golds(heldout.prompts, verifier, limits)
        longest = heldout.longest + config.eval_max_tokens
    train = _prompts(config, facts, config.data, config.rollout.max_tokens, trains=True)
    _check_refill(config, train)
    golds = training_golds(config.data, train, verifier, limits, rewards_need_them=needs_golds(config))
    check_golds_for_rewards(config, train, golds)
    longest = max(longest, train.longest + config.rollout.max_tokens)
    sets: dict[str, PromptSet] = {}
    for name, part in config.evaluation.parts().items():
        if name in config.evaluation.sets and part.data is not None:
            tokens = part.max_tokens or config.rollout.max_tokens
            sets[name] = _prompts(config, facts, part.data, tokens, f"evaluation.sets.{name}.data")
            check_golds(sets[name].prompts, part.verifier, limits)
            longest = max(longest, sets[name].longest + tokens)
    scored = max(longest, train.longest_scored + config.rollout.max_tokens)
    facts.check_roles(config, scored)
    paths = ModelPaths(
        student_dir=resolve_model(config.student),
        teacher_dirs={group.name: resolve_model(group.model) for group in config.scorer_groups},
        stop_ids=facts.stop_ids,
        student_stop_ids=facts.end_ids,
        teacher_stop_ids={group.name: facts.teachers[group.section].stop_ids for group in config.scorer_groups},
        vocabulary=facts.student.vocabulary,
        max_model_len=longest,
        scored_len=scored,
    )
    return Prepared(facts, train, golds, heldout, paths, file_digests(config), sets)


def _prompts(
    config: Config,
    facts: ModelFacts,
    data: DataConfig,
    max_tokens: int,
    section: str | None = None,
    *,
    trains: bool = False,
) -> PromptSet:
    """Prompts that leave room for `max_tokens`: held out, to be graded, or what the run `trains` on.

    `section` is where the configuration has `data`; None: as one would think.
    """
    longest, teachers = facts.max_prompt_tokens(max_tokens), config.teacher_contexts if trains else None
    return load_prompts(
        data, facts.tokenizer, longest, graded=not trains, teacher=facts.teacher_tokenizer,
        with_tasks=trains and has_functions(config), environment=config.environment, teachers=teachers,
        completions=CompletionLimits(facts.end_ids, max_tokens),
        renderers=facts.renderers(config) if teachers else None, section=section,
    )  # fmt: skip


def _check_refill(config: Config, train: PromptSet) -> None:
    """There are other prompts than those of one batch, where others are to be drawn."""
    batches, each = config.objective.rl.max_num_gen_batches, config.rollout.prompts_per_step
    if batches > 1 and config.objective.rl.weight and len(train.prompts) <= each:
        raise UserError(
            f"objective.rl.max_num_gen_batches = {batches}: draws other prompts for a step, and {train.source} has "
            f"only {len(train.prompts)}, of which a step takes rollout.prompts_per_step = {each}; lower that, or "
            "use 1"
        )
