"""The vLLM teacher on a real engine in this process: vLLM's front door, scheduler, prefix cache and model on a CPU.

Only the V2 model runner is not real, which needs a GPU: `tests.support.vllm_scores` says what stands in for it.
Blocks have 32 tokens, the fewest that vLLM's attention takes on a CPU.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actors.teacher.settings import ScorerSettings
from actors.teacher.transformers_backend import TransformersTeacher
from kat_ray.errors import StateLost, UserError
from tests.support.chunks import chunk_of, random_rollouts
from tests.support.configs import make_config
from tests.support.models import make_model
from tests.support.vllm_scores import on_cpu, patch_scores, patch_v2_flag

pytestmark = pytest.mark.integration  # vLLM takes seconds to import and to start

LONGEST, BLOCK = 256, 32  # LONGEST is the models' own max_position_embeddings
STOP_IDS = (1, 5)


def settings_of(student, teacher, longest=LONGEST, stop_ids=STOP_IDS, rule="none", top_k=64):
    config = make_config(
        student, teacher, scorer={"num_gpus": 1, "cache_block": BLOCK, "max_batch_tokens": 128},
        termination={"rule": rule}, rollout={"top_k_logprobs": top_k},
    )  # fmt: skip
    return on_cpu(ScorerSettings.from_config(config, teacher, stop_ids, longest))


@pytest.fixture(scope="module")
def engine(models):
    """A started engine whose front door believes in the V2 runner."""
    with pytest.MonkeyPatch.context() as patch:
        patch_scores(patch)
        from actors.teacher.vllm_engine import start_engine

        settings = settings_of(models["student"][0], models["teacher"][0])
        started = start_engine(settings, kv_cache_memory_bytes=2**25, enforce_eager=True)
        patch_v2_flag(patch)
        yield started


@pytest.fixture
def teachers(models, engine):
    """The vLLM teacher and the transformers teacher, of the same weights and settings."""
    from actors.teacher.vllm_backend import VllmTeacher

    assert engine.reset_prefix_cache(), "of the test before"
    settings = settings_of(models["student"][0], models["teacher"][0])
    return VllmTeacher(settings, engine), TransformersTeacher(settings)


def unfinished(engine):
    return engine.engine_core.engine_core.scheduler.get_request_counts()


def ragged(count=6, seed=0):
    """Rollouts of 96 tokens, with prompts around one and two blocks."""
    rng = np.random.default_rng(seed)
    lengths = (31, 32, 33, 63, 64, 65)[:count]
    draw = lambda n: rng.integers(2, 200, n).tolist()  # noqa: E731
    return {i: (draw(n), draw(96)) for i, n in enumerate(lengths)}


def chunks(student, rollouts, size, longest):
    for start in range(0, longest, size):
        a, b = dict.fromkeys(rollouts, start), dict.fromkeys(rollouts, start + size)
        yield chunk_of(student, rollouts, start=a, end=b)


@pytest.mark.parametrize("size", [16, 24, 32])
def test_both_backends_give_the_same_columns(models, engine, teachers, size):
    """In pieces that end anywhere in a block, prompts longer than a batch of 128 tokens in several steps."""
    student, (ours, other) = models["student"][1], teachers
    rollouts = ragged()
    rollouts[9] = (np.random.default_rng(5).integers(2, 200, 150).tolist(), rollouts[0][1])
    asked = 0
    for chunk in chunks(student, rollouts, size, 96):
        a, b = (teacher.score(chunk, chunk.topk_ids()) for teacher in (ours, other))
        np.testing.assert_allclose(a.topk, b.topk, atol=1e-4)
        np.testing.assert_allclose(a.tail.exp(), b.tail.exp(), atol=1e-5)
        np.testing.assert_allclose(a.stop, b.stop, atol=1e-4)
        assert torch.isnan(a.teacher_max).all() and torch.isnan(a.overlap).all()
        asked += chunk.tokens + len(chunk.context_ids)
    assert asked < ours.run_tokens <= 2.5 * asked, "a block of 32 again with every chunk at most"
    assert not ours._alone, "no request met a cached block past its first row"
    ours.release(list(rollouts))
    assert ours.held == 0
    with pytest.raises(StateLost, match=r"\[0, 1, 2, 3, 4, 5, 9\] is not held"):
        ours.score(chunk, chunk.topk_ids())


@pytest.mark.parametrize("memory", [2**40, 0])
def test_pieces_are_compared_with_a_plain_copy_or_with_passes_of_whole_rollouts(
    models, teachers, monkeypatch, memory
):
    """As the check at a run's start does; the copy is left out where it does not fit."""
    from actors.teacher import plain_copy
    from actors.teacher.agreement import chunked_logprobs

    monkeypatch.setattr(plain_copy, "free_memory", lambda: memory)
    ours, other = teachers
    pairs = [(prompt, tokens[: 5 + 7 * i]) for i, (prompt, tokens) in ragged(4).items()]
    ran = ours.run_tokens
    plain = ours.plain_logprobs(pairs)
    assert ours.run_tokens == ran and ours.held == 0
    for own, copy, theirs in zip(
        chunked_logprobs(ours, pairs, 64), plain, other.plain_logprobs(pairs), strict=True
    ):
        np.testing.assert_allclose(own, copy, atol=1e-4)
        np.testing.assert_allclose(own, theirs, atol=1e-4)
    assert ours.held == 0


def test_a_rollout_may_be_as_long_as_the_teacher_takes(models, teachers):
    """256 positions, all of them used: vLLM itself takes no prompt of its max_model_len."""
    student, (ours, other) = models["student"][1], teachers
    rng = np.random.default_rng(1)
    rollout = {0: (rng.integers(2, 200, LONGEST - 96).tolist(), rng.integers(2, 200, 96).tolist())}
    for chunk in chunks(student, rollout, 48, 96):
        a, b = (teacher.score(chunk, chunk.topk_ids()) for teacher in (ours, other))
        np.testing.assert_allclose(a.topk, b.topk, atol=1e-4)


@pytest.fixture
def no_engine_yet(monkeypatch):
    """As in a scorer's process, in which no engine was started before: vLLM keeps its environment from then on."""
    from vllm import envs
    from vllm.config import VllmConfig

    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", False)
    monkeypatch.setitem(vars(envs), "VLLM_ALLOW_LONG_MAX_MODEL_LEN", False)


def test_one_that_is_longer_is_refused_in_a_sentence(models, no_engine_yet):
    from actors.teacher.vllm_engine import start_engine

    with pytest.raises(UserError, match=r"teacher.path = .*vLLM cannot start it: .*max_model_len \(257\)"):
        start_engine(settings_of(models["student"][0], models["teacher"][0], longest=LONGEST + 1))


@pytest.mark.parametrize("top_k", [64, 256])
def test_the_front_door_takes_the_widest_rows(monkeypatch, models, tmp_path, no_engine_yet, top_k):
    """The k ids of the student and all stop ids, in one row; `engine_args` as the engine is started with."""
    from vllm.v1.engine.input_processor import InputProcessor

    from actors.teacher.vllm_backend import VllmTeacher
    from actors.teacher.vllm_engine import engine_args

    make_model(tmp_path / "m", vocabulary=400)
    settings = settings_of(models["student"][0], str(tmp_path / "m"), stop_ids=tuple(range(9)), top_k=top_k)
    config = engine_args(settings).create_engine_config()
    config.cache_config.num_gpu_blocks = 100
    door = SimpleNamespace(
        vllm_config=config, model_config=config.model_config, input_processor=InputProcessor(config),
        engine_core=Core(), get_supported_tasks=lambda: ("generate",),
    )  # fmt: skip
    patch_v2_flag(monkeypatch)
    teacher = VllmTeacher(settings, door)
    chunk = chunk_of(models["student"][1], random_rollouts(3, tokens=(20, 30)))
    ids = np.random.default_rng(0).integers(0, 400, (chunk.tokens, top_k)).astype(np.int32)
    assert teacher.score(chunk, ids).topk.shape == (chunk.tokens, top_k)
    assert [r.sampling_params.prompt_logprob_token_ids.shape[1] for r in door.engine_core.taken] == [top_k + 9] * 3


class Core:
    """Answers each request with zeros of the right shape, and keeps what was asked."""

    def __init__(self):
        self.taken, self._open = [], []

    def add_request(self, request):
        self.taken.append(request)
        self._open.append(request)

    def get_output(self):
        outputs = [
            SimpleNamespace(
                request_id=r.request_id, finish_reason=1, prefill_stats=None, new_prompt_logprobs_tensors=None,
                prompt_token_id_logprobs=torch.zeros(r.sampling_params.prompt_logprob_token_ids.shape),
            )
            for r in self._open
        ]  # fmt: skip
        self._open = []
        return SimpleNamespace(outputs=outputs)


def test_rollouts_with_the_same_first_tokens_are_scored_all_the_same(models, teachers):
    """The first leaves blocks past the others' first rows; vLLM drops their scores and is asked again."""
    student, (ours, other) = models["student"][1], teachers
    prompt, tokens = random_rollouts(1, seed=8, prompt=(31, 32), tokens=(96, 97))[0]
    rollouts = {i: (prompt, [*tokens[:40], *(t % 190 + 2 + i for t in tokens[40:])]) for i in range(4)}
    for chunk in chunks(student, rollouts, 48, 96):
        a, b = (teacher.score(chunk, chunk.topk_ids()) for teacher in (ours, other))
        np.testing.assert_allclose(a.topk, b.topk, atol=1e-4)
    assert ours._alone, "so it happened"
    ours.release(list(rollouts))
    assert not ours._alone


def test_overlap_is_known_where_the_rule_needs_it(models, engine, teachers):
    from actors.teacher.vllm_backend import VllmTeacher

    student, other = models["student"][1], teachers[1]
    needs = settings_of(models["student"][0], models["teacher"][0], rule="prune_opd")
    assert needs.top_needed
    ours = VllmTeacher(needs, engine)
    rollouts = ragged(3, seed=4)
    for chunk in chunks(student, rollouts, 32, 96):
        a, b = (teacher.score(chunk, chunk.topk_ids()) for teacher in (ours, other))
        np.testing.assert_allclose(a.overlap, b.overlap, atol=0.07)  # a tie of two ids may go either way
        np.testing.assert_allclose(a.teacher_max, b.teacher_max, atol=1e-4)
        assert (a.top == b.top).float().mean() > 0.98
        np.testing.assert_allclose(a.topk, b.topk, atol=1e-4)


@pytest.mark.nightly
def test_its_own_most_likely_ids_are_those_of_transformers(models, teachers):
    """For the learner; d and whatever rules see are at the student's."""
    student = models["student"][1]
    rollouts = random_rollouts(4, seed=9)
    chunk = chunk_of(student, rollouts)
    ours, other = (teacher.score(chunk, chunk.topk_ids(), 12) for teacher in teachers)
    torch.testing.assert_close(ours.topk, other.topk, atol=1e-4, rtol=1e-4)
    for a, b in zip((ours.targets.ids, ours.targets.topk), (other.targets.ids, other.targets.topk), strict=True):
        assert a.shape == (chunk.tokens, 12) == b.shape
    same = ours.targets.ids == other.targets.ids
    assert same.float().mean() > 0.98, "but for ties of rounding"
    torch.testing.assert_close(ours.targets.topk, other.targets.topk, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.targets.tail.exp(), other.targets.tail.exp(), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.targets.stop.exp(), other.targets.stop.exp(), atol=1e-4, rtol=0)


def test_nothing_is_left_of_a_request_that_could_not_be_added(models, engine, teachers, monkeypatch):
    student, (ours, other) = models["student"][1], teachers
    rollouts = ragged(3, seed=2)
    first, second = list(chunks(student, rollouts, 48, 96))
    ours.score(first, first.topk_ids())
    ids = second.topk_ids().copy()
    ids[-1, -1] = 200  # the last rollout's: vLLM has no such id
    with pytest.raises(UserError, match=r"vLLM refuses to score rollout 2: .*out-of-vocab"):
        ours.score(second, ids)
    assert unfinished(engine) == (0, 0)
    added, add = [], engine.engine_core.add_request

    def fail_at_the_second(request):
        if added:
            raise ConnectionError("the engine's socket is closed")
        added.append(request)
        add(request)

    with monkeypatch.context() as patch:
        patch.setattr(engine.engine_core, "add_request", fail_at_the_second)
        with pytest.raises(ConnectionError):
            ours.score(second, second.topk_ids())
    assert unfinished(engine) == (0, 0)
    other.score(first, first.topk_ids())
    a, b = (teacher.score(second, second.topk_ids()) for teacher in (ours, other))
    np.testing.assert_allclose(a.topk, b.topk, atol=1e-4)


@pytest.mark.parametrize("death", ["EngineDeadError", "OutOfMemoryError"])
def test_what_an_engine_dies_of_is_not_swallowed(models, engine, teachers, monkeypatch, death):
    from vllm.v1.engine.exceptions import EngineDeadError

    error = {"EngineDeadError": EngineDeadError, "OutOfMemoryError": torch.OutOfMemoryError}[death]()

    def die(*arguments, **named):
        raise error

    ours, chunk = teachers[0], chunk_of(models["student"][1], random_rollouts(2))
    with monkeypatch.context() as patch:
        patch.setattr(engine.engine_core, "get_output", die)
        with pytest.raises(type(error)):
            ours.score(chunk, chunk.topk_ids())
    assert ours.held == 0 and unfinished(engine) == (0, 0)


def test_ids_that_the_teacher_has_no_token_for_are_no_stop_ids_of_it(models, engine, teachers):
    from actors.teacher.vllm_backend import VllmTeacher

    wide = replace(settings_of(models["student"][0], models["teacher"][0]), stop_ids=(1, 5, 999))
    chunk = chunk_of(models["student"][1], random_rollouts(2))
    a = VllmTeacher(wide, engine).score(chunk, chunk.topk_ids())
    np.testing.assert_allclose(a.stop, teachers[1].score(chunk, chunk.topk_ids()).stop, atol=1e-4)
