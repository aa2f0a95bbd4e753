"""Columns are made where the distribution is: only they leave the device."""

from typing import ClassVar

import pytest
import torch

from actors.teacher.backend import columns_of
from actors.teacher.settings import ScorerSettings
from actors.teacher.transformers_backend import TransformersTeacher
from kat_ray.losses.divergence import entropy
from tests.support.configs import make_config

N, V, K = 40, 500, 16


class OnDevice(torch.Tensor):
    """Plays a tensor of a GPU: writes down how many elements every copy to the CPU, or to Python, takes along."""

    leaving: ClassVar[list[int]] = []
    EXITS = (torch.Tensor.cpu, torch.Tensor.to, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in cls.EXITS and (function is not torch.Tensor.to or "cpu" in map(str, args[1:])):
            cls.leaving.append(args[0].numel())
        return super().__torch_function__(function, types, args, kwargs or {})


def problem():
    g = torch.Generator().manual_seed(0)
    logprobs = torch.log_softmax(torch.randn(N, V, generator=g) * 3, -1)
    return logprobs, torch.log_softmax(torch.randn(N, V, generator=g), -1).topk(K, dim=-1).indices


def test_columns_by_their_definitions():
    logprobs, ids = problem()
    found = columns_of(logprobs, ids, (3, 7))
    for n in range(N):
        row, top = logprobs[n].double(), ids[n].tolist()
        outside = [v for v in range(V) if v not in {*top, 3, 7}]
        assert found.topk[n].tolist() == logprobs[n, top].tolist()
        assert found.tail[n].item() == pytest.approx(row[outside].logsumexp(0).item(), abs=1e-5)
        stops = [v for v in (3, 7) if v not in top]
        assert found.stop[n].item() == pytest.approx(row[stops].logsumexp(0).item(), abs=1e-5)
        best = set(row.topk(16).indices.tolist())
        assert found.overlap[n].item() == pytest.approx(len(best & set(top)) / 16)
        assert found.top[n].item() == row.argmax().item()
    torch.testing.assert_close(found.teacher_entropy, entropy(logprobs))


def test_the_distribution_does_not_leave_its_device(models):
    teacher_dir = models["teacher"][0]
    settings = ScorerSettings.from_config(make_config(models["student"][0], teacher_dir), teacher_dir, (1, 5), 64)
    teacher = TransformersTeacher(settings)
    hidden = torch.randn(N, 64, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(N * K).view(N, K) % 200
    with torch.inference_mode():
        expected, OnDevice.leaving = teacher.columns(hidden, ids), []
        found = teacher.columns(hidden.as_subclass(OnDevice), ids)
    assert sorted(OnDevice.leaving) == [N] * 6 + [N * K], "k + 6 numbers a token, not the vocabulary's 200"
    for a, b in zip(vars(found).values(), vars(expected).values(), strict=True):
        assert torch.equal(a.as_subclass(torch.Tensor), b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_they_are_the_same():
    logprobs, ids = problem()
    sides = (columns_of(x, ids, (3, 7)) for x in (logprobs.cuda(), logprobs))
    for a, b in zip(*(vars(side).values() for side in sides), strict=True):
        assert a.device.type == "cpu"
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
