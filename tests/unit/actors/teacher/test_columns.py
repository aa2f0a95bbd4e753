"""Columns are made where the distribution is: only they leave the device."""

from typing import ClassVar

import pytest
import torch

from actors.teacher.backend import columns_of
from actors.teacher.settings import ScorerSettings
from actors.teacher.transformers_backend import TransformersTeacher
from kat_ray.losses.divergence import LOG_FLOOR, entropy
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
    assert found.targets is None is expected.targets
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(a.as_subclass(torch.Tensor), b)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_at_a_temperature_the_learner_gets_masses_of_the_whole_vocabulary(temperature):
    logprobs, ids = problem()
    found, plain = columns_of(logprobs, ids, (3, 7), temperature), columns_of(logprobs, ids, (3, 7))
    for a, b in zip(tensors(found), tensors(plain), strict=True):
        assert torch.equal(a, b), "what rules see is at temperature 1"
    exact = torch.log_softmax(logprobs.double() / temperature, -1)
    outside = exact.scatter(-1, ids, -torch.inf)
    stop, rest = outside[:, [3, 7]], outside.clone()
    rest[:, [3, 7]] = -torch.inf
    targets = found.targets
    torch.testing.assert_close(targets.topk.double(), exact.gather(-1, ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(targets.tail.double(), rest.logsumexp(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(targets.stop.double(), stop.logsumexp(-1), atol=1e-5, rtol=1e-5)
    assert (targets.stop - found.stop).abs().mean() > 0.3, "masses at T are others"


def test_ids_that_the_teacher_lacks_have_the_floor_at_any_temperature(models):
    teacher_dir = models["teacher"][0]
    config = make_config(models["student"][0], teacher_dir, objective={"opd": {"teacher_temperature": 2.0}})
    settings = ScorerSettings.from_config(config, teacher_dir, (1,), 64, student_vocabulary=210)
    hidden, ids = torch.randn(2, 64), torch.tensor([[3, 205], [209, 4]])
    with torch.inference_mode():
        found = TransformersTeacher(settings).columns(hidden, ids)
    foreign = ids >= 200
    assert (found.targets.topk[foreign] == LOG_FLOOR).all() and (found.targets.topk[~foreign] > LOG_FLOOR).all()


def tensors(columns):
    return [value for name, value in vars(columns).items() if name != "targets"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_they_are_the_same():
    logprobs, ids = problem()
    sides = (columns_of(x, ids, (3, 7)) for x in (logprobs.cuda(), logprobs))
    for a, b in zip(*(tensors(side) for side in sides), strict=True):
        assert a.device.type == "cpu"
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
