"""What two sections of a configuration have to agree on. Each check raises ValueError; the first one ends them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kat_ray.config.cluster import PoolConfig
from kat_ray.config.environment import check_environment, is_environment
from kat_ray.config.off_policy import check_off_policy
from kat_ray.config.teachers import (
    average_decay_of,
    check_column,
    check_names,
    check_servers,
    check_student_as_teacher,
    groups_of,
    section_of,
)
from kat_ray.termination import RULES
from kat_ray.types.records import DEFAULT_TEACHER

if TYPE_CHECKING:
    from kat_ray.config.sections import Config

# Features of tokens (`NewTokens`) that vLLM's scores of given ids do not contain.
_NOT_FROM_VLLM = ("teacher_entropy",)


def _teacher_where_it_is_needed(config: Config) -> None:
    """What is asked of a teacher has one."""
    check_names(config.teachers)
    weight, rule = config.objective.opd.weight, config.termination.rule
    needs = [f"objective.opd.weight = {weight:g}"] * bool(weight)
    needs += [f"termination.rule = {rule!r}"] * (rule != "none")
    if needs and config.teacher is None and not config.teachers:
        who = " and ".join(needs)
        raise ValueError(
            f"teacher is missing: {who} need{'s' * (len(needs) == 1)} one; name it with teacher.path. Rewards "
            "alone need none: objective.opd.weight = 0 with termination.rule = none"
        )
    for name, data in (("data", config.data), ("evaluation.data", config.evaluation.data)):
        if data is None or data.chat_template != "teacher":
            continue
        if not needs:
            raise ValueError(
                f"{name}.chat_template = 'teacher': no teacher is read with objective.opd.weight = 0 and "
                "termination.rule = 'none'; use student, or the path of a template"
            )
        if config.teacher is None:
            raise ValueError(
                f"{name}.chat_template = 'teacher': is that of the section `teacher`, and there is none; use "
                "student, or the path of a template"
            )


def _teacher_renders_chats(config: Config) -> None:
    """A template of the teacher's own stands beside one of the student's."""
    for name, teacher in config.all_teachers.items():
        if teacher.chat_template == "data":
            continue
        if config.data.chat_template is False or (
            config.data.chat_template == "teacher" and name == DEFAULT_TEACHER
        ):
            raise ValueError(
                f"{section_of(name)}.chat_template = 'own': needs data.chat_template = student, or the path of "
                "a template, which the student has instead"
            )


def _prompts_name_their_teachers(config: Config) -> None:
    """Names of teachers, what each one is, and where its server is."""
    heldout = config.evaluation.data
    check_column(config.teachers, config.data.teacher_column, None if heldout is None else heldout.teacher_column)
    for group in groups_of(config.all_teachers, config.scorer):
        for name in group.teachers:
            check_student_as_teacher(
                name, config.all_teachers[name], config.student, group.scorer, config.learner.lora
            )
    average_decay_of(config.all_teachers)
    check_servers(groups_of(config.all_teachers, config.scorer), config.cluster.hang_timeout)


def _environment_where_it_is_named(config: Config) -> None:
    """Problems of an environment are asked for, and told apart, in one way."""
    evaluation = config.evaluation
    heldout = None if evaluation.data is None else evaluation.data.path
    check_environment(config.environment, evaluation.verifier, config.data.path, heldout)
    if not is_environment(config.data.path):
        return
    if config.data.source_column is not None:
        raise ValueError(
            f"data.source_column = {config.data.source_column!r}: problems of the environment are told apart "
            "by their family; leave it out"
        )
    if config.environment is not None and config.environment.curriculum and not config.objective.rl.weight:
        raise ValueError(
            "environment.curriculum: needs objective.rl.weight > 0: without rewards not all rollouts are "
            "graded before the next step is sampled; leave it out"
        )


def _work_for_every_rank(config: Config) -> None:
    """No rank is without a rollout."""
    if config.learner.world_size > config.rollout.rollouts_per_step:
        raise ValueError(
            f"learner.world_size = {config.learner.world_size}: must be <= {config.rollout.rollouts_per_step}, the "
            "rollouts of a step (rollout.prompts_per_step x rollout.rollouts_per_prompt)"
        )


def _deterministic_is_on_policy(config: Config) -> None:
    """What is to be the same to the bit does not depend on the machine's pace."""
    if config.run.deterministic and config.rollout.staleness:
        raise ValueError(
            "run.deterministic = true: needs rollout.staleness = 0; sampling ahead races with the learner"
        )
    pools: dict[str, PoolConfig] = {"samplers": config.sampler}
    for group in config.scorer_groups:
        words = "scorers" if group.name == DEFAULT_TEACHER else f"scorers of {group.section}"
        pools[words] = group.scorer
    elastic = [name for name, pool in pools.items() if len({*pool.bounds}) > 1]
    if config.run.deterministic and elastic:
        raise ValueError(
            f"run.deterministic = true: needs a fixed number of {' and '.join(elastic)}; leave min_replicas "
            "and max_replicas out"
        )


def _rewards_can_teach(config: Config) -> None:
    """Rewards are compared within groups, of the policy that the loss takes."""
    if not config.objective.rl.weight:
        if config.run.learner_logprobs:
            raise ValueError("run.learner_logprobs = true: needs objective.rl.weight > 0, as the sampler's do")
        return
    rollout, needs = config.rollout, f"objective.rl.weight = {config.objective.rl.weight:g}: needs "
    if rollout.rollouts_per_prompt < 2:
        raise ValueError(
            f"{needs}rollout.rollouts_per_prompt >= 2 (it is 1): a reward is held against those of the other "
            "rollouts of its prompt; 8 are usual"
        )
    for name, value in (("temperature", rollout.temperature), ("top_p", rollout.top_p)):
        if value != 1:
            raise ValueError(
                f"{needs}rollout.{name} = 1 (it is {value:g}): the policy that samples would be another one "
                "than the policy whose probabilities the loss takes, and no metric would show it"
            )
    rl = config.objective.rl
    if rollout.staleness and rl.loss == "reinforce" and rl.correction == "none":
        raise ValueError(
            f"{needs}a ratio of learner to sampler with rollout.staleness = 1: objective.rl.loss = 'clip', "
            "'cispo' or 'gspo', or objective.rl.correction = 'truncate'"
        )
    if rl.overlong.buffer > rollout.max_tokens:
        raise ValueError(
            f"objective.rl.overlong.buffer = {rl.overlong.buffer}: must be <= rollout.max_tokens = "
            f"{rollout.max_tokens}, whose last tokens it is"
        )
    if rl.max_num_gen_batches > 1 and config.objective.opd.weight:
        raise ValueError(
            f"objective.rl.max_num_gen_batches = {rl.max_num_gen_batches}: needs objective.opd.weight = 0 (it "
            f"is {config.objective.opd.weight:g}): where a teacher teaches, groups of one reward have their KL, "
            "and no other prompts are needed for them; set one of the two"
        )
    _check_reward(config, needs)
    share = getattr(config.termination, "probe_share", 0.0)
    if rl.cut_reward == "probe_weighted" and len(config.used_teachers) > 1 and _probes_vary(config):
        raise ValueError(
            f"objective.rl.cut_reward = {rl.cut_reward!r}: with termination.budget each teacher has a share of "
            "probes of its own, and a rollout would be weighed by another's; use 'failure' or 'probe_mean', or "
            "termination.budget = null"
        )
    if rl.cut_reward.startswith("probe") and config.termination.rule != "none" and not share:
        raise ValueError(f"objective.rl.cut_reward = {rl.cut_reward!r}: needs termination.probe_share > 0")


def _probes_vary(config: Config) -> bool:
    """Whether the rule may ask for fewer probes than `termination.probe_share`."""
    return getattr(config.termination, "budget", None) is not None


def _check_reward(config: Config, needs: str) -> None:
    """What grades rollouts has what it needs."""
    verifiers, own = config.reward.verifiers, config.evaluation.verifier
    if config.data.answer_column is None and (verifiers or not config.reward.functions):
        raise ValueError(
            f"{needs}gold answers to grade rollouts by: name a column with data.answer_column, or functions of "
            "your own with reward.functions"
        )
    if verifiers and verifiers != [own]:
        raise ValueError(
            f"reward.functions: {' and '.join(verifiers)}: must be {own}, as evaluation.verifier is; an answer "
            "is judged in one way"
        )


def _work_for_every_monitor(config: Config) -> None:
    """No monitor is without a sampler."""
    samplers = config.sampler.bounds[0]
    if config.monitor.shards > samplers:
        raise ValueError(
            f"monitor.shards = {config.monitor.shards}: must be <= {samplers}, the fewest samplers; "
            "a sampler's rollouts belong to one monitor"
        )


def _rule_gets_what_it_needs(config: Config) -> None:
    """Engines report what the rule reads."""
    lacking = [name for name in RULES[config.termination.rule].needs if name in _NOT_FROM_VLLM]
    for group in config.scorer_groups if lacking else ():
        if group.engine == "vllm":
            raise ValueError(
                f"termination.rule = {config.termination.rule!r}: it needs {', '.join(lacking)} of every token, "
                f"which a teacher on vLLM does not report; set {group.scorer_section}.backend = "
                "'transformers', or take another rule"
            )


def _vllm_has_a_gpu(config: Config) -> None:
    """Teachers on vLLM run on GPUs, as `make_teacher` would say in a scorer's process."""
    for group in config.scorer_groups:
        if group.engine == "vllm" and not group.scorer.num_gpus:
            field = group.scorer_section
            raise ValueError(
                f"{field}.backend = 'vllm': needs a GPU, and {field}.num_gpus = 0: scoring given ids takes vLLM's "
                "V2 model runner, which runs on no CPU; use 'auto' or 'transformers', or give scorers a GPU "
                f"({field}.num_gpus = 1)"
            )


def _completions_are_there(config: Config) -> None:
    """Completions of the data have a column, and a teacher where they are distilled."""
    heldout = config.evaluation.data
    check_off_policy(
        config.objective.off_policy, config.rollout.prompts_per_step, config.data.completion_column,
        None if heldout is None else heldout.completion_column, bool(config.used_teachers),
        config.objective.rl.max_num_gen_batches if config.objective.rl.weight else 1,
    )  # fmt: skip


def _teachers_give_what_is_learnt(config: Config) -> None:
    """Engines of teachers give what the loss takes."""
    temperature = config.objective.opd.teacher_temperature
    for group in config.scorer_groups if temperature != 1 else ():
        if group.scorer.engine == "vllm":
            raise ValueError(
                f"objective.opd.teacher_temperature = {temperature:g}: takes the teacher's whole distribution, "
                f"and vLLM gives log-probabilities of single ids at temperature 1; set "
                f"{group.scorer_section}.backend = 'transformers', or leave the temperature at 1"
            )


CHECKS = (
    _teacher_where_it_is_needed,
    _teacher_renders_chats,
    _prompts_name_their_teachers,
    _environment_where_it_is_named,
    _work_for_every_rank,
    _deterministic_is_on_policy,
    _rewards_can_teach,
    _work_for_every_monitor,
    _rule_gets_what_it_needs,
    _vllm_has_a_gpu,
    _completions_are_there,
    _teachers_give_what_is_learnt,
)
"""In the order in which they are made."""
