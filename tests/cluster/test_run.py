"""The whole job on a local Ray, with the real vLLM and DeepSpeed, two of everything; asserted on its records."""

import json
import re
from itertools import pairwise
from math import inf

import numpy as np
import pytest
from ray._private.state import actors

from actors.cluster.samplers import Engines
from actors.cluster.waiting import Limit, wait_for_start
from actors.driver import train as job
from kat_ray.analysis.objective import differences, recorded_steps, replayed
from kat_ray.analysis.replay import load_traces
from kat_ray.analysis.replay_rules import COLUMNS, reproduce
from kat_ray.records.traces import read_traces
from kat_ray.termination import RunFacts
from kat_ray.termination.calibration import quantile
from tests.support.rules import ACTING, check_acting
from tests.support.runs import AHEAD, ALONE, CHUNK, QUICK, SINGLE, config_of

pytestmark = pytest.mark.integration

SAME = {"run": {"deterministic": True}}


@pytest.fixture(scope="module")
def finished(ray_local, files, tmp_path_factory):
    """One finished run: its configuration, directory, summary, traces and metrics."""
    config = config_of(files, tmp_path_factory.mktemp("runs"), **SAME)
    path = job.train(config)
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return config, path, json.loads((path / "summary.json").read_text()), read_traces(path).to_pylist(), metrics


def test_every_rollout_ended_once_and_every_token_is_accounted_for(finished):
    config, _, summary, traces, _ = finished
    expected = config.run.steps * config.rollout.rollouts_per_step
    assert summary["rollouts_started"] == expected == sum(summary["rollouts_ended"].values())
    assert sorted(t["rollout_id"] for t in traces) == list(range(expected))
    books = {name: summary[f"{name}_tokens"] for name in ("generated", "kept", "overshoot", "cut_back", "scored")}
    assert books["generated"] == books["kept"] + books["overshoot"] + books["cut_back"]
    assert books["generated"] == sum(len(t["token_ids"]) for t in traces)
    assert books["scored"] == sum(len(t["d"]) for t in traces)
    assert summary["rollouts_ended"]["failed"] == 0


def test_cut_rollouts_stop_in_the_engine_and_keep_nothing_past_the_cut(finished):
    config, _, summary, traces, _ = finished
    cut = [t for t in traces if t["stop_reason"] == "trapped"]
    assert len(cut) >= 5, "the run must trap rollouts for this to mean anything"
    assert any(len(t["token_ids"]) < config.rollout.max_tokens - 8 for t in cut)
    # A decision answers one of AHEAD chunks under way; the chunk being built and the one sent meanwhile follow it.
    allowed = (AHEAD + 1) * CHUNK
    kept = 0
    for t in traces:
        length = len(t["token_ids"])
        if t["stop_reason"] == "trapped":
            assert not t["probe"] and config.termination.exempt <= t["cut"] < t["confirmed"] <= length
            assert length <= t["confirmed"] + allowed
            kept += t["cut"]
        else:
            assert t["cut"] is None and len(t["d"]) == length
            assert t["stop_reason"] == ("eos" if t["token_ids"][-1] == 1 else "max_tokens")
            kept += length
    assert kept == summary["kept_tokens"] == summary["trained_tokens"], "the loss saw the kept tokens and no other"


def test_the_threshold_is_the_quantile_of_the_minima_seen_before(finished):
    config, _, _, traces, metrics = finished
    rule, buffer, steps = config.termination, [], config.run.steps
    for step in range(steps):
        rows = [t for t in traces if t["step"] == step]
        active = step >= rule.min_steps and len(buffer) >= rule.min_samples
        threshold = quantile(buffer, 1 - rule.eta) if active else None
        assert {t["threshold"] for t in rows} == {threshold}
        fed = [t for t in rows if t["minimum"] is not None and (t["probe"] or not active)]
        buffer = [*buffer, *(t["minimum"] for t in fed)][-rule.buffer :]
    assert threshold is not None
    assert any("kat/threshold" in m for m in metrics)


def test_recorded_values_replay_to_the_same_cuts(finished):
    from kat_ray.termination import NewTokens
    from kat_ray.termination.kat import KatTracker

    config, _, _, traces, _ = finished
    for t in traces:
        tracker = KatTracker(config.termination, t["threshold"], t["probe"])
        tracker.observe(NewTokens(np.array(t["d"])))
        at = tracker.cut.at if tracker.cut else None
        assert at == (t["would_cut"] if t["probe"] else t["cut"])
        assert tracker.minimum == t["minimum"]


def test_sampler_and_learner_are_the_same_student_after_every_update(finished):
    _, _, _, _, metrics = finished
    steps = [m for m in metrics if "learner/loss" in m]
    assert [m["policy_version"] for m in steps] == [0, 1, 2, 3, 4]
    for m in steps:
        assert m["learner/logprob_diff_max"] < 1e-4, "the sampler's log-probabilities follow the learner's"
        assert m["learner/loss"] == pytest.approx(m["kl/kept_mean"], rel=1e-3)
        assert m["learner/tokens"] == m["rollout/kept_tokens"]


def test_the_run_compared_its_engines(finished):
    """Before its first step: two samplers as loaded and after two publications, the learner, and two scorers."""
    _, path, *_ = finished
    (said,) = re.findall(r"agreement: (\d+) comparisons .* hold; the widest", (path / "run.log").read_text())
    assert int(said) >= 2 * 3 + 1 + 2


def test_the_checkpoint_loads_and_has_moved(finished, files):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, path, _, _, _ = finished
    before = AutoModelForCausalLM.from_pretrained(files / "student").state_dict()
    after = AutoModelForCausalLM.from_pretrained(path / "checkpoints" / "step-5").state_dict()
    assert max((after[n].float() - before[n].float()).abs().max() for n in before) > 1e-3
    assert len(AutoTokenizer.from_pretrained(path / "checkpoints" / "step-5")) == 166


def test_summary_says_what_ran(finished):
    config, path, summary, _, _ = finished
    assert summary["seed"] == 0 and summary["steps"] == 5 and summary["wall_seconds"] > 0
    for name in ("eval_before", "eval_after"):
        assert {"avg_at_k", "pass_at_k", "k", "problems", "mean_length"} <= set(summary[name])
        assert (summary[name]["k"], summary[name]["problems"]) == (2, 6)
    assert "ray" in summary["versions"]
    from kat_ray.config.load import load_config

    assert load_config(path / "config.yaml") == config
    assert "run" in (path / "run.log").read_text()


@pytest.mark.nightly  # each run compares both engines with plain forwards: test_the_run_compared_its_engines
def test_a_teacher_equal_to_the_student_gives_no_kl_through_the_whole_pipeline(ray_local, files, tmp_path):
    config = config_of(
        files, tmp_path, teacher={"path": str(files / "student")}, termination={"rule": "none"}, run={"steps": 2},
        **SINGLE | {"learner": {"world_size": 1, "lr": 1e-12}},
    )  # fmt: skip
    path = job.train(config)
    d = np.concatenate([t["d"] for t in read_traces(path).to_pylist()])
    assert len(d) > 500 and np.abs(d).max() < 1e-4
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(m["learner/loss"]) < 1e-4 for m in metrics if "learner/loss" in m)


def test_weights_and_budget_of_a_rule_reach_learner_and_engine(ray_local, files, tmp_path):
    rule = {"rule": "prune_opd", "level": 0.9, "decay": 0.05, "start": 20, "growth": 4, "probe_share": 0.25}
    path = job.train(config_of(files, tmp_path, termination=rule, run={"steps": 3}, **SINGLE))
    traces = read_traces(path).to_pylist()
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in metrics if "learner/loss" in m]
    assert steps[0]["rollout/budget"] == 20
    for t in traces:
        budget = 48 if t["probe"] else steps[t["step"]]["rollout/budget"]
        assert len(t["token_ids"]) <= budget
        bad = np.cumsum(np.array(t["overlap"], np.float32) < 0.9)
        assert np.allclose(t["weights"], np.clip(1 - 0.05 * bad, 0, 1)[: len(t["weights"])], atol=1e-3)
        if t["stop_reason"] == "trapped":
            assert t["weights"][t["cut"]] == 0 < t["weights"][t["cut"] - 1]
    without = 0
    for number, m in enumerate(steps):
        kept = [t["weights"][: t["cut"]] for t in traces if t["step"] == number]
        weights = np.concatenate(kept)
        values = np.concatenate([t["d"][: t["cut"]] for t in traces if t["step"] == number])
        assert m["learner/tokens"] == (weights > 0).sum()
        without += int((weights == 0).sum())
        assert m["learner/loss"] == pytest.approx(np.average(values, weights=weights), rel=2e-3)
    assert without > 0, "some probes must go on at weight 0 for this to mean anything"


def test_a_replay_of_the_run_gives_its_cuts_again(finished):
    config, path, *_ = finished
    traces, notes = load_traces(path)
    again = reproduce(traces, config.termination, RunFacts(config.run.seed, config.rollout.max_tokens))
    recorded = np.where(traces.probe == 1, traces.would_cut, traces.cut)
    assert not notes and (recorded >= 0).sum() > 5
    assert again.cut.tolist() == recorded.tolist()


def check_rule(config, path):
    """What a rule ended was not generated to its end, and a replay says the same."""
    traces, _ = load_traces(path, COLUMNS)
    generated = np.array([len(t["token_ids"]) for t in read_traces(path).to_pylist()])
    check_acting(config.termination.rule, traces, generated, config.rollout.max_tokens)
    facts = RunFacts(config.run.seed, config.rollout.max_tokens)
    again = reproduce(traces, config.termination, facts).cut
    assert again.tolist() == np.where(traces.probe == 1, traces.would_cut, traces.cut).tolist()


@pytest.mark.parametrize(
    "rule",
    [rule if rule["rule"] == "kat" else pytest.param(rule, marks=pytest.mark.nightly) for rule in ACTING],
    ids=[rule["rule"] for rule in ACTING],
)
def test_every_rule_acts_while_rollouts_are_generated(finished, files, tmp_path, rule):
    """Stubs, where a rule does not need the text of a model: vLLM is told no more of one than of another."""
    if rule["rule"] == "length_matched":
        rule = {**rule, "run": str(finished[1])}
    few = {"top_k_logprobs": 16}
    config = config_of(files, tmp_path, termination=rule, run={"steps": 3}, rollout=few, **SINGLE)
    check_rule(config, job.train(config, engines=Engines() if rule["rule"] == "repetition" else QUICK))


def test_staleness_samples_a_step_while_the_one_before_is_learnt(ray_local, files, tmp_path):
    """With a rule that reads what vLLM generates, and ends it."""
    (repetition,) = (rule for rule in ACTING if rule["rule"] == "repetition")
    config = config_of(
        files,
        tmp_path,
        termination=repetition,
        rollout={"staleness": 1},
        run={"steps": 4, "profile": True},
        **SINGLE,
    )
    path = job.train(config)
    check_rule(config, path)
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in metrics if "learner/loss" in m]
    assert [m["policy_version"] for m in steps] == [0, 0, 1, 2]
    assert [m["rollout/staleness"] for m in steps] == [0, 1, 1, 1]
    # The KL that is learnt from is the newest student's, not the sampler's: at lr 1e-3 the two differ visibly.
    assert steps[0]["learner/logprob_diff_mean"] < 1e-4 < min(m["learner/logprob_diff_mean"] for m in steps[1:])
    text = (path / "timeline.json").read_text()
    events = json.loads(text.rstrip().rstrip(",") + "]")
    rows = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M"}
    assert {"driver", "sampler:0", "scorer:0", "monitor:0", "learner:0"} <= rows.keys()
    spans = [e for e in events if e["ph"] == "X"]
    published = [e["ts"] for e in spans if e["tid"] == rows["driver"] and e["name"] == "publish"]
    generated = [e["ts"] for e in spans if e["name"] == "generate"]
    # However fast each of them is: step n + 1 is generated before what step n learnt is published.
    assert [sum(begin < ts < end for ts in generated) > 0 for begin, end in pairwise([0.0, *published, inf])] == [
        True, True, True, False, False
    ], "the samplers are one step ahead"  # fmt: skip


def test_rewards_and_the_teacher_in_one_loss(ray_local, files, tmp_path):
    """Both losses of the learner are those that traces and prompts give, in float64."""
    rl = {"weight": 1.0, "advantage": "dr_grpo", "loss": "reinforce", "correction": "truncate"}
    config = config_of(
        files, tmp_path, run={"steps": 3}, objective={"opd": {"weight": 0.3}, "rl": rl},
        student={"path": "demo:student"}, teacher={"path": "demo:teacher"}, data={"path": "demo:train"},
        rollout={"prompts_per_step": 4, "rollouts_per_prompt": 6, "top_p": 1.0, "max_tokens": 96},
        **SINGLE | {"evaluation": {"data": None, "verifier": "integer"}},
    )  # fmt: skip
    path = job.train(config)
    traces = read_traces(path).to_pylist()
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in metrics if "learner/loss" in m]
    assert len(steps) == 3 and any("rl/loss" in m for m in steps)
    for number, m in enumerate(steps):
        rows = [t for t in traces if t["step"] == number]
        assert m["learner/loss"] == pytest.approx(m["kl/kept_mean"], rel=1e-3), "the KL up to the cut, as ever"
        cut = [t for t in rows if t["cut"] is not None]
        graded = [t for t in rows if t["correct"] is not None]
        assert len(cut) + len(graded) == len(rows) == 24, "a rollout was cut, or it has an answer that is graded"
        assert m["reward/mean"] == pytest.approx(sum(bool(t["correct"]) for t in rows) / 24)
        tokens = sum(len(t["token_ids"]) if t["cut"] is None else t["confirmed"] for t in rows)
        assert m["rl/tokens"] == tokens >= m["learner/tokens"]
        assert m["rl/ratio_mean"] == pytest.approx(1.0, abs=1e-3) and m["rl/effective_share"] > 0.999
        loss = 0.0
        for row in rows:
            logprobs = np.array(row["sampled_logprobs"])
            assert len(logprobs) == len(row["token_ids"]) and np.isfinite(logprobs).all()
            loss -= row["policy_weight"] * row["advantage"] * logprobs[: row["policy_tokens"]].sum()
        assert m["rl/loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
    assert any(t["advantage"] for t in traces), "some answers to a prompt are right, others are not"
    assert any(t["cut"] is not None for t in traces)
    recorded, notes = recorded_steps(path, config)
    assert differences(recorded, replayed(recorded, config)) == notes == [] and len(recorded) == 3


def test_rewards_alone_start_no_scorer_and_no_monitor_and_read_no_teacher(ray_local, files, tmp_path):
    """Advantages and loss are those that traces and verdicts give; sampler and learner are one student."""
    before = {*actors()}
    config = config_of(
        files, tmp_path, run={"steps": 3}, **ALONE, student={"path": "demo:student"}, data={"path": "demo:train"},
        rollout={"prompts_per_step": 12, "rollouts_per_prompt": 6, "max_tokens": 128, "top_p": 1.0},
        **SINGLE | {"evaluation": {"data": None, "verifier": "integer"}},
    )  # fmt: skip
    path = job.train(config)
    made = {actor["Name"] for id, actor in actors().items() if id not in before and actor["Name"]}
    assert made == {"kat:sampler:0", "kat:learner:0"}
    log = (path / "run.log").read_text()
    assert "teacher.path = '/no/such/teacher' is not read" in log and "agreement: " in log
    traces = read_traces(path).to_pylist()
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in metrics if "learner/loss" in m]
    assert [m["policy_version"] for m in steps] == [0, 1, 2] and any(m["learner/grad_norm"] > 0 for m in steps)
    assert any(t["correct"] for t in traces)
    for number, m in enumerate(steps):
        rows = [t for t in traces if t["step"] == number]
        assert len(rows) == 72 and all(t["d"] == [] and t["teacher_top"] is None for t in rows)
        group = {p: [t["correct"] for t in rows if t["prompt_id"] == p] for p in {t["prompt_id"] for t in rows}}
        advantage = [float(t["correct"]) - np.mean(group[t["prompt_id"]]) for t in rows]
        lengths = [len(t["token_ids"]) for t in rows]
        assert m["advantage/abs_mean"] == pytest.approx(np.mean(np.abs(advantage)), abs=1e-12)
        assert m["rl/tokens"] == m["learner/tokens"] == sum(lengths)
        assert m["rl/ratio_mean"] == pytest.approx(1.0, abs=1e-3) == m["rl/ratio_max"]
        assert m["rl/loss"] == pytest.approx(-np.dot(advantage, lengths) / sum(lengths), abs=1e-4)
        assert m["learner/logprob_diff_max"] < 1e-3 and 0 < m["learner/entropy"] < np.log(166)


@pytest.mark.nightly
def test_the_same_command_gives_the_same_run(finished, files, tmp_path):
    """To the bit, with two of everything."""
    *_, metrics = finished
    again = job.train(config_of(files, tmp_path, **SAME)) / "metrics.jsonl"
    losses = [json.loads(line).get("learner/loss") for line in again.read_text().splitlines()]
    assert losses == [m.get("learner/loss") for m in metrics] and len({*losses}) >= 5


def test_what_cannot_be_placed_is_named(ray_local, files, tmp_path):
    from kat_ray.errors import UserError

    config = config_of(files, tmp_path, sampler={"replicas": 3, "num_gpus": 1}, cluster={"placement_timeout": 1})
    with pytest.raises(UserError, match=r"the cluster has 0 GPU, the roles ask for 3 \(3 x sampler 1\)"):
        job.train(config)
    with pytest.raises(UserError, match=r"the cluster has 8 CPU"):
        job.train(config_of(files, tmp_path, scorer={"num_cpus": 9}, cluster={"placement_timeout": 1}))


def test_a_deadline_names_what_was_waited_for(ray_local):
    import ray

    from kat_ray.errors import UserError

    @ray.remote
    def sleep():
        import time

        time.sleep(20)

    ref = sleep.remote()
    with pytest.raises(UserError, match=r"waited 0.2 s for a nap"):
        wait_for_start([lambda: ref], "a nap", Limit(0.2, "a limit"))
    ray.cancel(ref, force=True)
