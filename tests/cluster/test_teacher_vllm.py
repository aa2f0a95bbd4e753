"""The vLLM teacher's rows, with a stub in place of the engine: only a GPU has the real one.

The stub answers as vLLM documents it, from the real tiny model: row i scores its ids as predictions of prompt token
start + i + 1; a request whose prefix is cached past its first row gets no scores.
"""

from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actors.teacher.settings import ScorerSettings
from actors.teacher.transformers_backend import TransformersTeacher
from kat_ray.errors import StateLost
from tests.support.chunks import chunk_of, random_rollouts
from tests.support.configs import make_config

pytestmark = pytest.mark.integration  # vLLM takes seconds to import


class StubEngine:
    """`input_processor` and `engine_core` of an engine that scores with a transformers model."""

    def __init__(self, model, cached_blocks_of=None):
        self.input_processor = self.engine_core = self
        self._model, self._requests, self._block = model, [], cached_blocks_of
        self._cached = {}
        self.refused = 0

    def process_inputs(self, name, prompt, params, supported_tasks):
        return name, prompt["prompt_token_ids"], params

    def add_request(self, request):
        self._requests.append(request)

    @torch.no_grad()
    def get_output(self):
        outputs = [self._answer(*request) for request in self._requests]
        self._requests = []
        return SimpleNamespace(outputs=outputs)

    def _answer(self, name, prompt, params):
        start, ids = params.prompt_logprob_start, torch.from_numpy(params.prompt_logprob_token_ids)
        assert len(ids) == len(prompt) - 1 - start, "vLLM refuses any other number of rows"
        scores = None
        cached = 0 if params.skip_reading_prefix_cache or not self._block else self._longest(prompt)
        if cached <= start:
            logprobs = torch.log_softmax(self._model(torch.tensor([prompt])).logits[0], -1)
            scores = logprobs[start : len(prompt) - 1].gather(-1, ids)
        else:
            self.refused += 1
        self._cached[tuple(prompt)] = True
        return SimpleNamespace(request_id=name, prompt_token_id_logprobs=scores, finish_reason=1)

    def _longest(self, prompt):
        shared = [
            next((i for i, (a, b) in enumerate(zip(p, prompt, strict=False)) if a != b), min(len(p), len(prompt)))
            for p in self._cached
        ]
        return max([0, *shared]) // self._block * self._block


def vllm_teacher(engine):
    from actors.teacher.vllm_backend import VllmTeacher

    teacher = object.__new__(VllmTeacher)
    teacher._engine, teacher._tasks, teacher._stop_ids = engine, (), (1, 5)
    teacher._tokens, teacher._numbers, teacher.run_tokens = {}, count(), 0
    return teacher


@pytest.mark.parametrize("block", [None, 4])
def test_both_engines_give_the_same_columns(models, block):
    student, (teacher_dir, teacher_model) = models["student"][1], models["teacher"]
    engine = StubEngine(teacher_model, block)
    ours = vllm_teacher(engine)
    other = TransformersTeacher(
        ScorerSettings.from_config(make_config(models["student"][0], teacher_dir), teacher_dir, (1, 5), 64)
    )
    rollouts = random_rollouts(6, tokens=(9, 20))
    for start, end in ((0, 4), (4, 8), (8, 9)):
        chunk = chunk_of(student, rollouts, start=dict.fromkeys(rollouts, start), end=dict.fromkeys(rollouts, end))
        a, b = (teacher.score(chunk, chunk.topk_ids()) for teacher in (ours, other))
        np.testing.assert_allclose(a.topk, b.topk, atol=1e-4)
        np.testing.assert_allclose(a.tail.exp(), b.tail.exp(), atol=1e-5)
        np.testing.assert_allclose(a.stop, b.stop, atol=1e-4)
        assert torch.isnan(a.teacher_max).all()
    assert engine.refused > 0 if block else engine.refused == 0
    ours.release(list(rollouts))
    assert ours.held == 0
    with pytest.raises(StateLost, match="is not held"):
        ours.score(chunk, chunk.topk_ids())
