"""What completions of the data need of other sections."""

from __future__ import annotations

from itertools import count

from kat_ray.config.objective import OffPolicyObjective


def check_off_policy(
    off_policy: OffPolicyObjective,
    prompts_per_step: int,
    column: str | None,
    heldout: str | None,
    teachers: bool,
    batches: int,
) -> None:
    """ValueError where completions cannot be learnt from; `teachers` says whether a teacher is asked, `batches` how
    many a step may sample.
    """
    share = off_policy.share
    if heldout is not None:
        raise ValueError(
            f"evaluation.data.completion_column = {heldout!r}: held-out problems are not learnt from; leave it out"
        )
    if not share:
        if column is not None:
            raise ValueError(
                f"data.completion_column = {column!r}: needs objective.off_policy.share > 0, the share of prompts "
                "whose completions are taken from it; or leave the column out"
            )
        return
    if column is None:
        raise ValueError(
            f"objective.off_policy.share = {share:g}: needs data.completion_column, the column with the completions"
        )
    if most_given(share, prompts_per_step) >= prompts_per_step:
        largest = 1 - 1 / prompts_per_step
        bound = f"hence be <= {largest:.4g} with" if largest else "and"
        raise ValueError(
            f"objective.off_policy.share = {share:g}: must leave a prompt of each step to the student, {bound} "
            f"rollout.prompts_per_step = {prompts_per_step}; {'lower the share, or ' if largest else ''}raise "
            f"rollout.prompts_per_step to {fewest_prompts(share)} or more"
        )
    if batches > 1:
        raise ValueError(
            f"objective.off_policy.share = {share:g}: needs objective.rl.max_num_gen_batches = 1, and it is "
            f"{batches}: a step that draws other prompts would draw some whose completions are given to a later one"
        )
    if off_policy.loss == "distillation" and not teachers:
        raise ValueError(
            "objective.off_policy.loss = 'distillation': no teacher is asked with objective.opd.weight = 0 and "
            "termination.rule = 'none'; use 'sft'"
        )


def fewest_prompts(share: float) -> int:
    """Prompts of the smallest step that leaves one of them to the student."""
    return next(n for n in count(int(1 / (1 - share))) if most_given(share, n) < n)


def most_given(share: float, prompts_per_step: int) -> int:
    """The largest number of a step's prompts whose completions are given."""
    mean = share * prompts_per_step
    return int(mean) + (mean > int(mean))
