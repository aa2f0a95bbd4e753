"""Steps whose numbers are not finite: skipped on all ranks alike, and nothing moves, to the bit."""

import json
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.driver import train as job
from actors.learner.model import load_student
from actors.learner.schedule import lr_factor
from actors.monitor.trap_monitor import TrapMonitor
from actors.sampler.settings import SamplerSettings
from actors.sampler.student_sampler import StudentSampler
from actors.teacher.scorer import TeacherScorer
from actors.teacher.settings import ScorerSettings
from kat_ray.data.accounting import join_outcomes, kept_rollouts
from kat_ray.errors import UserError
from kat_ray.run.step_metrics import rollout_metrics
from kat_ray.termination import RunFacts
from kat_ray.types.records import EngineEnd, EngineRows, GenerateRequest, KeptRollout, RolloutSpec
from tests.cluster.ranks import Group, step_of
from tests.support.chunks import random_rollouts
from tests.support.configs import make_config
from tests.support.models import make_model
from tests.support.runs import QUICK, SINGLE, config_of


def with_weight(step, value):
    """The step with one token of one rollout weighed by `value`: its rank's loss is not finite, no other's."""
    chunk, teacher, kept = step
    weights = np.ones(kept[3].kept, dtype=np.float32)
    weights[1] = value
    return chunk, teacher, [replace(k, weights=weights) if k is kept[3] else k for k in kept]


def heavy(step):
    """The step with weights whose mean over the loss is fine, while the loss, a sum, overflows in float32."""
    chunk, teacher, kept = step
    return chunk, teacher, [replace(k, weights=np.full(k.kept, 4e37, dtype=np.float32)) for k in kept]


def with_teacher(step, value):
    chunk, teacher, kept = step
    return chunk, replace(teacher, topk_logprobs=np.full_like(teacher.topk_logprobs, value)), kept


def bad_steps(step):
    """Each with the sum of its weights; by what is wrong with it."""
    finite = sum(k.weight for k in step[2])
    return {
        "a weight that is NaN": (with_weight(step, np.nan), finite),
        "a weight that is infinite": (with_weight(step, np.inf), finite),
        "a sum of weights that is NaN": (step, np.nan),
        "a sum of weights that is infinite": (step, np.inf),
        "a loss that overflows": (heavy(step), sum(k.weight for k in heavy(step)[2])),
        "a teacher that rules the student out": (with_teacher(step, -3e38), finite),
        "a teacher without any finite value": (with_teacher(step, np.nan), finite),
    }


CASES = [(s, d, w) for w in (1, 2) for s in (0, 1, 2, 3) for d in ("float32", "bfloat16")]
TIERS = {(1, "float32", 1): (), (3, "bfloat16", 2): pytest.mark.integration}  # of the others: nightly


@pytest.mark.parametrize(
    ("stage", "dtype", "world_size"),
    [pytest.param(*case, marks=TIERS.get(case, pytest.mark.nightly)) for case in CASES],
)
def test_a_step_that_is_not_finite_moves_nothing_on_any_rank(models, stage, dtype, world_size):
    settings = {"zero_stage": stage, "dtype": dtype, "warmup_ratio": 0.0, "min_lr_ratio": 1.0}
    steps = [step_of(models, random_rollouts(7, seed=s)) for s in range(4)]
    with Group(models, world_size, **settings) as clean:
        expected = [clean.train(s) for s in steps[:2]][-1]
        after = clean.everything()
    with Group(models, world_size, **settings) as group:
        for step, then in zip(steps[:2], steps[2:], strict=True):
            for what, (bad, weight) in bad_steps(then).items():  # before the first step that counts, and after it
                before = group.everything()
                reports = group.train(bad, weight)
                assert [r.skipped for r in reports] == [True] * world_size, what
                assert {r.grad_norm for r in reports} == {np.inf}, what
                assert group.everything() == before, what
            good = group.train(step)
            assert not any(r.skipped for r in good)
        # The learning rate is constant here, so what the skipped steps left behind would show.
        assert group.everything() == after
        assert (good[0].loss, good[0].grad_norm) == (expected[0].loss, expected[0].grad_norm)


def test_what_a_step_without_a_single_finite_kl_reports(models):
    step = step_of(models, random_rollouts(4))
    total = sum(k.kept for k in step[2])
    with Group(models, 1) as group:
        first, report = (group.train(with_teacher(step, np.nan))[0] for _ in range(2))
        (good,) = group.train(step)
        (empty,) = group.all("train_step", [], [], [], 0, 0)
    assert (report.tokens, report.dropped_tokens, report.skipped) == (0, total, True) and np.isnan(report.loss)
    lr = [1e-3 * lr_factor(s, 10, 0.03, 0.0) for s in range(3)]
    assert [r.lr for r in (first, report, good)] == lr and lr[2] < lr[1], "a skipped step counts in the schedule"
    assert (empty.skipped, empty.grad_norm, empty.tokens) == (False, 0.0, 0)


def test_some_rows_without_finite_values_are_dropped_and_the_rest_is_learnt(models):
    chunk, teacher, kept = step_of(models, random_rollouts(4, seed=2))
    topk = teacher.topk_logprobs.copy()
    first = slice(0, kept[0].kept)  # all of rollout 0's kept rows
    topk[first] = np.nan
    results = []
    for rows, work in ((replace(teacher, topk_logprobs=topk), kept), (teacher, kept[1:])):
        with Group(models, 1) as group:
            (report,) = group.train((chunk, rows, work), weight=sum(k.weight for k in kept))
            results.append((report, group.weights()))
    (broken, weights), (expected, others) = results
    assert (broken.dropped_tokens, broken.tokens, broken.skipped) == (kept[0].kept, expected.tokens, False)
    assert broken.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, value in weights.items():
        # The two have other micro-batches; AdamW divides by a gradient's size, also where that is rounding alone.
        np.testing.assert_allclose(value, others[name], atol=5e-5, err_msg=name)


def test_an_id_beyond_the_vocabulary_is_named_by_the_learner(models):
    chunk, teacher, kept = step_of(models, {5: ([7, 8], [9, 10, 11])})
    changes = {"answer": {"token_ids": chunk.token_ids + 195}, "prompt": {"context_ids": np.array([3, 200])}}
    with Group(models, 1) as group:
        for part, change in changes.items():
            words = rf"rollout 5: its {part} holds the token id 20\d.*vocabulary of 200 ids"
            with pytest.raises(ValueError, match=words):
                group.train((replace(chunk, **change), teacher, kept))


def test_a_prompt_of_padding_ids_trains_like_one_of_any_other_id(models, tmp_path):
    twin = make_model(tmp_path / "twin", seed=1, tied=False)
    assert twin.config.pad_token_id == 0
    with torch.no_grad():
        twin.model.embed_tokens.weight[0] = twin.model.embed_tokens.weight[7]
    twin.save_pretrained(tmp_path / "twin")
    models = models | {"student": (str(tmp_path / "twin"), twin)}
    answers = {i: [t for t in tokens if t not in (0, 7)] for i, (_, tokens) in random_rollouts(5, seed=4).items()}
    sevens, zeros = (step_of(models, {i: ([prompt] * 3, t) for i, t in answers.items()}) for prompt in (7, 0))
    results = []
    for chunk in (sevens[0], zeros[0]):  # the teacher, for which 0 and 7 are two ids, has said the same of both
        with Group(models, 1) as group:
            results.append((group.step(chunk, *sevens[1:]), group.weights()))
    (other, theirs), (padding, ours) = results
    assert (padding.loss, padding.tokens) == (other.loss, other.tokens) and padding.tokens > 0
    assert padding.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
    embedding = theirs["model.embed_tokens.weight"] = theirs["model.embed_tokens.weight"].copy()
    assert np.abs(embedding[7] - embedding[0]).max() > 1e-5, "the prompt's own embedding learns from it"
    embedding[[0, 7]] = embedding[[7, 0]]
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=1e-6, err_msg=name)


def test_no_embedding_is_left_out_for_its_id(models):
    config = make_config(models["student"][0], models["teacher"][0])
    student = load_student(config.student, models["student"][0], config.learner).network
    student(torch.zeros((1, 4), dtype=torch.long)).logits[..., 5].sum().backward()
    plain = models["student"][1].model.embed_tokens.weight
    assert plain.shape == student.model.embed_tokens.weight.shape
    assert student.model.embed_tokens.padding_idx is None
    assert student.model.embed_tokens.weight.grad[0].abs().max() > 0


def test_a_batch_cut_to_nothing_is_not_a_skipped_step(models):
    chunk, teacher, kept = step_of(models, random_rollouts(3))
    nothing = [KeptRollout(k.rollout_id, k.prompt_length, 0) for k in kept]
    with Group(models, 1) as group:
        before = group.everything()
        for work in ([], nothing):
            (report,) = group.all("train_step", [chunk], [teacher], work, 0.0, 0)
            assert (report.tokens, report.loss, report.skipped) == (0, 0.0, False)
            assert group.everything() == before


class SilentEngine:
    """An engine that gives up every second request before its first token, and ends the others after three."""

    def __init__(self, top_k):
        self._top_k, self._left = top_k, {}

    @property
    def running(self):
        return len(self._left)

    def add(self, request_id, prompt_ids, seed, settings):
        self._left[request_id] = 3 if int(request_id) % 2 else 0

    def step(self):
        rows = []
        for name, left in list(self._left.items()):
            ids = np.arange(5, 6 + self._top_k, dtype=np.int32)[None]
            logprobs = np.full(ids.shape, -np.log(2 * self._top_k), np.float32)
            if left == 0:
                rows.append(EngineRows(name, [], None, None, EngineEnd.FAILED))
            else:
                end = EngineEnd.EOS if left == 1 else EngineEnd.RUNNING
                rows.append(EngineRows(name, [5], ids, logprobs, end))
            self._left[name] = left - 1
            if rows[-1].end is not EngineEnd.RUNNING:
                del self._left[name]
        return rows

    def abort(self, request_ids):
        assert not request_ids


@pytest.mark.integration
def test_generations_without_a_token_go_through_sampler_scorer_and_monitor(ray_local, models):
    config = make_config(
        models["student"][0], models["teacher"][0], rollout={"top_k_logprobs": 8, "chunk_tokens": 2}
    )
    actor = ray.remote(num_cpus=0.5, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
    scorer = actor(TeacherScorer).remote(
        "scorer:0", ScorerSettings.from_config(config, models["teacher"][0], (1,), 64)
    )
    monitor = actor(TrapMonitor).remote(config.termination, RunFacts(0, 64))
    settings = SamplerSettings.from_config(
        config, config.student, "", stop_ids=(1,), vocabulary=200, max_model_len=64
    )
    sampler = StudentSampler("sampler:0", settings, lambda _: SilentEngine(8))
    sampler.connect({"default": [scorer]}, monitor)
    for step, ids in enumerate(([0, 1, 2, 3], [4, 6])):  # in the second step nobody generates anything
        specs = [RolloutSpec(i, "p", (7,) * (1 + i), 0, False, 64) for i in ids]
        step_start = ray.get(monitor.start_step.remote(step))
        report = sampler.generate(GenerateRequest(step + 1, step, 0, tuple(specs), {}))
        finished = join_outcomes(report.rollouts, ray.get(monitor.end_step.remote()).outcomes)
        reasons = ["eos" if i % 2 else "failed" for i in ids]
        assert [r.outcome.stop_reason for r in finished] == reasons
        assert [r.counts.generated for r in finished] == [3 if i % 2 else 0 for i in ids]
        kept = kept_rollouts(finished, specs)
        assert [(k.rollout_id, k.prompt_length, k.kept) for k in kept] == [(i, 1 + i, 3) for i in ids if i % 2]
        assert rollout_metrics(finished, step_start)["rollout/failed"] == reasons.count("failed")
    assert ray.get(scorer.stats.remote())["states"] == 0
    for handle in (scorer, monitor):
        ray.kill(handle)


LINE_END = 15  # of the demo's tokenizer


@pytest.mark.integration
def test_a_run_whose_teacher_breaks_is_stopped_with_a_dump(ray_local, files, tmp_path):
    """A teacher that breaks at the line's end, which every prompt has: every row of every step is NaN.

    What is tried when it is loaded has no line's end; the check before the first step would refuse it.
    """
    from safetensors.numpy import load_file

    teacher = make_model(tmp_path / "teacher", seed=2, vocabulary=166, tied=False)
    with torch.no_grad():
        teacher.model.embed_tokens.weight[LINE_END] = torch.nan
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(files / "teacher").save_pretrained(tmp_path / "teacher")
    config = config_of(
        files, tmp_path, teacher={"path": str(tmp_path / "teacher")},
        **SINGLE | {"learner": {"max_skipped_steps": 2}, "run": {"check_agreement": False}},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"max_skipped_steps = 2: step 2 is the last of 2 in a row") as error:
        job.train(config)
    path = tmp_path / "run"
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [m["learner/skipped"] for m in lines] == [1.0, 1.0] and "kl/mean" not in lines[0]
    assert [m["learner/dropped_tokens"] for m in lines] == [m["rollout/kept_tokens"] for m in lines]
    assert str(path / "dumps" / "step-2.safetensors") in str(error.value)
    dump = load_file(path / "dumps" / "step-2.safetensors")
    assert np.isnan(dump["d"]).all() and len(dump["d"]) == lines[1]["rollout/kept_tokens"]
    saved = AutoModelForCausalLM.from_pretrained(path / "checkpoints" / "step-2").state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(files / "student").state_dict().items():
        assert torch.equal(saved[name], value.float()), name


@pytest.mark.integration
def test_a_guard_ends_a_run_after_a_checkpoint(ray_local, files, tmp_path):
    guards = {"action": "stop", "patience": 2, "max_tokens_share": 0.0}
    config = config_of(
        files, tmp_path, guards=guards, termination={"rule": "none"}, rollout={"top_k_logprobs": 16}, **SINGLE
    )
    with pytest.raises(
        UserError, match=r"guards.max_tokens_share = 0: rollout/max_tokens_share is .* at step 2, above"
    ):
        job.train(config, engines=QUICK)
    path = tmp_path / "run"
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [m["guards/fired"] for m in lines] == [0.0, 1.0]
    assert (path / "checkpoints" / "step-2" / "model.safetensors").is_file() and not (path / "dumps").exists()
    assert (path / "run.log").read_text().count("max_tokens_share is") == 2, "an early line, and the error"
