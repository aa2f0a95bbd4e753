"""Every metric of a run: its name, unit and meaning, in one place. Nothing else is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Metric(NamedTuple):
    """One column of metrics.jsonl and TensorBoard."""

    name: str
    unit: str
    help: str


METRICS = {
    m.name: m
    for m in (
        Metric(
            "policy_version", "version", "weights the step's rollouts were sampled from; 0 is the student as given"
        ),
        Metric("rollout/generated_tokens", "tokens", "all tokens the engines generated in the step"),
        Metric(
            "rollout/kept_tokens",
            "tokens",
            "tokens before the cut, or all of an uncut rollout: these are trained on",
        ),
        Metric(
            "rollout/overshoot_tokens",
            "tokens",
            "generated after the rule had confirmed, until the abort took hold",
        ),
        Metric("rollout/cut_back_tokens", "tokens", "between the cut and its confirmation"),
        Metric("rollout/mean_length", "tokens", "generated tokens per rollout"),
        Metric("rollout/eos_share", "share", "rollouts that ended by a stop id"),
        Metric("rollout/max_tokens_share", "share", "rollouts that reached rollout.max_tokens"),
        Metric("rollout/trapped_share", "share", "rollouts ended by the rule"),
        Metric("rollout/budget", "tokens", "longest rollout that the rule allows in the step, where it sets one"),
        Metric("rollout/staleness", "versions", "by how much the learner's weights were newer than the samplers'"),
        Metric("rollout/failed", "rollouts", "rollouts that the engine gave up"),
        Metric("rollout/probes", "rollouts", "rollouts of the step that are never cut"),
        Metric("probe/would_cut_share", "share", "probes that the rule would have cut"),
        Metric("probe/false_cut_share", "share", "graded probes that it would have cut and that answered right"),
        Metric("probe/right_share", "share", "graded probes that answered right, cut or not"),
        Metric("probe/q", "reward", "given to rollouts that were cut (objective.rl.cut_reward = probe_mean)"),
        Metric("probe/ran_out", "rollouts", "without a verdict, because grading took too much time or memory"),
        Metric("probe/errors", "rollouts", "without a verdict, because grading failed in another way"),
        Metric("probe/tokens_after_cut", "tokens", "mean length of the continuation that a cut would have removed"),
        Metric("probe/kl_after_cut", "nats", "mean reverse KL of those continuations"),
        Metric("probe/kl_lost_share", "share", "mean share of a probe's KL that its cut would have removed"),
        Metric("kat/threshold", "nats", "threshold of the step's rollouts; absent while the rule is inactive"),
        Metric("kat/window_min_mean", "nats", "mean over rollouts of the smallest window mean m(y)"),
        Metric("reward/mean", "reward", "mean of the rollouts that have one, before groups are filtered"),
        Metric("reward/std", "reward", "standard deviation of those"),
        Metric("reward/min", "reward", "smallest of those, before penalties for length"),
        Metric("reward/left_out_failed", "rollouts", "without a reward: an engine gave them up"),
        Metric("reward/left_out_cut", "rollouts", "without a weight: the rule cut them (objective.rl.cut_reward)"),
        Metric("reward/left_out_truncated", "rollouts", "without a weight: too long (objective.rl.truncated)"),
        Metric("reward/left_out_not_graded", "rollouts", "without a reward: no gold answer, or no verdict"),
        Metric("reward/left_out_constant_group", "rollouts", "by objective.rl.filter_constant_groups"),
        Metric("reward/overlong", "reward", "mean penalty for length (objective.rl.overlong), within reward/mean"),
        Metric(
            "reward/errors", "rollouts", "without a reward: a function or the verifier failed, or gave no number"
        ),
        Metric("reward/timeouts", "rollouts", "without a reward: grading took too long, or was not reached"),
        Metric("reward/seconds", "s", "that the step waited for reward functions after its rollouts had ended"),
        Metric("group/constant_share", "share", "prompts whose rollouts all have one reward, penalties aside"),
        Metric("group/all_wrong_share", "share", "prompts whose rollouts all have one reward, 0 or less"),
        Metric(
            "group/std", "reward", "standard deviation of the rewards of a prompt's rollouts, mean over prompts"
        ),
        Metric("group/gen_batches", "batches", "of prompts that the step sampled (rl.max_num_gen_batches > 1)"),
        Metric("group/prompts", "prompts", "of these batches"),
        Metric("group/missing", "groups", "of rollout.prompts_per_step, that none of these prompts gave"),
        Metric("group/size_min", "rollouts", "that count, of the smallest group"),
        Metric("advantage/abs_mean", "1", "mean size of the advantages"),
        Metric("advantage/max", "1", "largest size of an advantage"),
        Metric("advantage/zero_share", "share", "tokens of the policy's loss whose advantage is 0"),
        Metric("kl/mean", "nats", "mean reverse KL of all scored tokens, at sampling time"),
        Metric("kl/kept_mean", "nats", "mean reverse KL of the kept tokens, at sampling time"),
        Metric("health/overlap", "share", "student's top-16 ids that are among the teacher's; kept tokens"),
        Metric("health/teacher_max", "probability", "the teacher's largest probability, mean; kept tokens"),
        Metric("health/teacher_entropy", "nats", "entropy of the teacher, mean; kept tokens"),
        Metric("health/student_entropy", "nats", "entropy of the student's events, mean; kept tokens"),
        Metric("health/tail_mass", "probability", "the student's mass outside its top k, mean; kept tokens"),
        Metric(
            "scorer/run_per_token",
            "tokens",
            "run by the teacher's engine for each token that scorers got, prompts included: above 1, some twice",
        ),
        Metric(
            "learner/loss",
            "nats",
            "(weighted) mean of objective.opd.divergence, by default the reverse KL, of the trained tokens in the "
            "learner's own forward pass; without a teacher the policy's loss",
        ),
        Metric("learner/grad_norm", "norm", "before clipping; null where the step was skipped"),
        Metric("learner/skipped", "steps", "1 where loss or gradient was not finite: nothing was updated; else 0"),
        Metric("learner/lr", "rate", "learning rate of the step"),
        Metric("learner/tokens", "tokens", "tokens in the loss"),
        Metric("learner/dropped_tokens", "tokens", "kept tokens without a finite KL, left out of the loss"),
        Metric("learner/logprob_diff_mean", "nats", "mean |log p learner - log p sampler| of the sampled tokens"),
        Metric(
            "learner/logprob_diff_max", "nats", "largest such difference: look here first when a run goes wrong"
        ),
        Metric(
            "learner/entropy",
            "nats",
            "entropy of the student's events under the learner, mean; without a teacher estimated from the tokens "
            "that were sampled",
        ),
        Metric("learner/tail_mass", "probability", "the student's mass outside the top k under the learner, mean"),
        Metric(
            "learner/kl_hidden",
            "nats",
            "estimate of the KL within the tail, which the loss does not see",
        ),
        Metric("objective/opd_weight", "1", "of the KL in the loss, where a weight changes from step to step"),
        Metric("objective/rl_weight", "1", "of the policy's loss, likewise"),
        Metric("rl/loss", "1", "the policy's loss, by objective.rl.aggregate"),
        Metric("rl/tokens", "tokens", "in the policy's loss"),
        Metric("rl/ratio_mean", "1", "mean of p learner / p sampler of the sampled tokens; 1 where both agree"),
        Metric("rl/ratio_max", "1", "largest of them"),
        Metric("rl/effective_share", "share", "(mean ratio)^2 / mean ratio^2: what the ratio leaves of the tokens"),
        Metric("rl/clip_low_share", "share", "tokens whose ratio was held from below"),
        Metric("rl/clip_high_share", "share", "tokens whose ratio was held from above"),
        Metric("rl/log_ratio_max", "nats", "largest |log p learner - log p sampler|"),
        Metric(
            "rl/entropy",
            "nats",
            "of the student's top k and the rest as one, mean over the policy's tokens; without a top k "
            "estimated from those that were sampled",
        ),
        Metric(
            "rl/grad_share",
            "share",
            "of the gradient in single tokens' logits (L1 norms, weights included), that the policy's loss has; "
            "the KL has the rest",
        ),
        Metric(
            "rl/grad_cosine",
            "1",
            "of the gradients of both losses in the logits of events: above 0 rewards and teacher want the same",
        ),
        Metric("rl/masked_share", "share", "tokens that objective.rl.correction leaves out of the loss"),
        Metric(
            "rl/length_right",
            "tokens",
            "mean length of rollouts with a right answer; without a gold one, rewarded above 0",
        ),
        Metric("rl/length_wrong", "tokens", "mean length of the other graded rollouts"),
        Metric("rl/cut_share", "share", "of the policy's tokens, that are of rollouts which the rule cut"),
        Metric(
            "rl/truncated_share", "share", "of the policy's tokens, that are of rollouts that ran to their limit"
        ),
        Metric(
            "learner/top_k_for_99",
            "tokens",
            "rollout.top_k_logprobs that would see 99 % of the student's mass, from a sample of tokens",
        ),
        Metric("learner/stop_mass", "probability", "the student's mass on stop ids, mean"),
        Metric("learner/micro_batches", "passes", "forward and backward passes of each rank"),
        Metric("learner/seconds", "s", "time of the optimiser step on rank 0"),
        Metric("guards/fired", "guards", "collapse guards beyond their limit for guards.patience steps or more"),
        Metric("time/step", "s", "whole step"),
        Metric("time/sample", "s", "that the driver waited for generating, scoring and monitoring"),
        Metric("time/sampling", "s", "the longest that a sampler took for its rollouts, waiting included"),
        Metric("time/sampler_busy", "s", "that samplers were not waiting for decisions, mean over samplers"),
        Metric("time/scorer_busy", "s", "that scorers were scoring, mean over scorers"),
        Metric("time/idle_share", "share", "of the step that its busiest stage idled: what is not overlapped"),
        Metric("time/monitor", "s", "CPU time of the (busiest) trap monitor for the step's scores"),
        Metric("time/score_wait", "s", "longest time a sampler waited for decisions"),
        Metric("time/control", "s", "CPU time of the busiest sampler in sending chunks and applying decisions"),
        Metric("time/decision_mean", "s", "from building a chunk to applying the decision on it, mean"),
        Metric("time/decision_max", "s", "the slowest decision of the step"),
        Metric("scorer/row_bytes_per_token", "bytes", "of the teacher's rows, which the learner fetches"),
        Metric(
            "transfer/chunk_bytes", "bytes", "of the arrays of the step's chunks, those of given completions too"
        ),
        Metric("transfer/score_bytes", "bytes", "of the arrays of its scores, which monitors and driver fetch"),
        Metric("transfer/row_bytes", "bytes", "of those of the teacher's rows"),
        Metric(
            "transfer/http_sent_bytes",
            "bytes",
            "of bodies to teachers' servers, repeated requests included; teachers behind HTTP",
        ),
        Metric("transfer/http_received_bytes", "bytes", "of bodies of their answers; teachers behind HTTP"),
        Metric("offpolicy/completions", "completions", "of the data, in place of rollouts (objective.off_policy)"),
        Metric("offpolicy/cut_off", "completions", "of those, as long as rollout.max_tokens lets a rollout be"),
        Metric("offpolicy/tokens", "tokens", "of those, in their loss; in no other count"),
        Metric("offpolicy/loss", "nats", "mean of objective.off_policy.loss over them"),
        Metric("offpolicy/nll", "nats", "mean of the student's -log p(token) over them"),
        Metric("offpolicy/dropped_tokens", "tokens", "of those completions, without a finite loss"),
        Metric("time/learn", "s", "optimiser step; the books are kept meanwhile"),
        Metric(
            "time/grade", "s", "grading after all rollouts have ended; without rewards, while the learner works"
        ),
        Metric("time/publish", "s", "weights to all samplers"),
        Metric("time/checkpoint", "s", "that the run stood still for checkpoints since the step before"),
        Metric("pool/restarts", "deaths", "actors that died since the last step, as those noticed who needed them"),
        Metric("pools/sampler_replicas", "samplers", "that the next step has"),
        Metric("pools/scorer_replicas", "scorers", "that the next step has"),
        Metric("pools/waiting_share", "share", "of the step, that the learner waited for rollouts; elastic pools"),
        Metric("pools/sampler_busy_share", "share", "of time/sampling, that samplers were at work; elastic pools"),
        Metric("pools/scorer_busy_share", "share", "of time/sampling, that scorers were at work; elastic pools"),
        Metric("pools/sampler_change", "samplers", "decided after the step: 1 more, 1 less or 0; elastic pools"),
        Metric("pools/scorer_change", "scorers", "decided after the step: 1 more, 1 less or 0; elastic pools"),
        Metric("pools/sampler_pending", "samplers", "asked for and not there yet; elastic pools"),
        Metric("pools/scorer_pending", "scorers", "asked for and not there yet; elastic pools"),
        Metric("store/used_share", "share", "of all object stores, when a step's records are all there"),
        Metric("store/spilled_bytes", "bytes", "that object stores spilled to disk since the run began"),
        Metric("throughput/tokens_per_second", "tokens/s", "generated tokens by the time of the whole step"),
        Metric("throughput/sampler", "tokens/s", "generated tokens by the busy seconds of all samplers: of one"),
        Metric("throughput/scorer", "tokens/s", "scored tokens by the busy seconds of all scorers: of one"),
        Metric(
            "throughput/learner", "tokens/s", "trained tokens by the seconds of the optimiser step: of the group"
        ),
        Metric("eval/avg_at_k", "share", "mean accuracy over k answers to each held-out problem"),
        Metric("eval/pass_at_k", "share", "held-out problems with a right answer among k"),
        Metric("eval/mean_length", "tokens", "mean length of an answer"),
        Metric("eval/ran_out", "answers", "graded as wrong because grading took too much time or memory"),
    )
}


# Metrics whose names end in what a configuration names, by how they begin.
FAMILIES = {
    m.name: m
    for m in (
        Metric("reward/part/", "reward", "mean of what this reward function gave, before its weight"),
        Metric("source/rollouts/", "rollouts", "of prompts from this source, such as a family of an environment"),
        Metric("source/tokens/", "tokens", "generated to its prompts"),
        Metric("source/mean_length/", "tokens", "generated tokens per rollout of its prompts"),
        Metric("source/pass_rate/", "share", "of its rollouts that have a verdict, that are right"),
        Metric("source/ungraded/", "rollouts", "of this source, that should have a verdict: grading them failed"),
        Metric("source/reward/", "reward", "mean of its rollouts that have one"),
        Metric("source/level/", "level", "of its problems in the step, from 0 (environment.curriculum)"),
        Metric("teacher/rollouts/", "rollouts", "that this teacher scored; of several teachers"),
        Metric("teacher/mean_length/", "tokens", "generated tokens per rollout of this teacher's"),
        Metric("teacher/kept_tokens/", "tokens", "of this teacher's rollouts, that are trained on"),
        Metric("teacher/trapped_share/", "share", "of this teacher's rollouts, that the rule ended"),
        Metric("teacher/kl_mean/", "nats", "mean reverse KL of all tokens that this teacher scored"),
        Metric("teacher/kl_kept_mean/", "nats", "mean reverse KL of those that are kept"),
        Metric("teacher/threshold/", "nats", "threshold of this teacher's rollouts; absent while it is inactive"),
        Metric("teacher/window_min_mean/", "nats", "mean of this teacher's smallest window means m(y)"),
        Metric("eval/avg_at_k/", "share", "mean accuracy over the answers to this held-out set (evaluation.sets)"),
        Metric("eval/pass_at_k/", "share", "problems of this held-out set with a right answer among its k"),
        Metric("eval/mean_length/", "tokens", "mean length of an answer to this held-out set"),
        Metric("eval/ran_out/", "answers", "to this held-out set, for whose grading time or memory ran out"),
        Metric("pools/scorer_replicas/", "scorers", "of this teacher, that the next step has"),
        Metric("pools/scorer_busy_share/", "share", "of time/sampling, that this teacher's scorers were at work"),
        Metric("pools/scorer_change/", "scorers", "of this teacher, decided after the step: 1 more, 1 less or 0"),
        Metric("pools/scorer_pending/", "scorers", "of this teacher, asked for and not there yet"),
    )
}


def metric_of(name: str) -> Metric | None:
    """The description of a metric; None where there is none."""
    return METRICS.get(name) or next((m for begin, m in FAMILIES.items() if name.startswith(begin)), None)


def check_names(names: Iterable[str]) -> None:
    """A metric that is not described above is a mistake of ours."""
    unknown = [name for name in names if metric_of(name) is None]
    assert not unknown, f"metrics without a description in kat_ray/observability/metric_catalog.py: {unknown}"
