"""Weights for other processes, in memory that they map; and what a load reports."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.sampler.weight_loading import LoadReport, _Reads, load_shared, shared
from kat_ray.models.weight_updates import tensors_of
from kat_ray.types.records import WeightUpdate


def update():
    """Two arrays of other types and odd sizes; the second under two names, as tied weights are."""
    a = np.arange(15, dtype=np.float32).reshape(3, 5)
    b = torch.randn(7, 3).bfloat16()
    arrays = (a, b.view(torch.uint16).numpy(), np.zeros((0, 4), np.float32))
    return WeightUpdate(
        4,
        ("a", "b", "c", "empty"),
        ("float32", "bfloat16", "bfloat16", "float32"),
        (*arrays[:2], arrays[1], arrays[2]),
    )


def read(weights, answers):
    """In another process: sums, types and shapes of what is shared, and whether tied weights are one memory."""
    import actors.sampler.weight_loading as module

    def load(worker, tensors):
        found = {name: t.clone() for name, t in tensors}
        return {n: (str(t.dtype), tuple(t.shape), t.double().sum().item()) for n, t in found.items()}

    module.load = load
    answers.put(load_shared(None, weights))


def test_another_process_reads_what_is_shared_and_nothing_is_left():
    given = update()
    expected = {n: (str(t.dtype), tuple(t.shape), t.double().sum().item()) for n, t in tensors_of(given)}
    context = multiprocessing.get_context("spawn")
    with shared(given) as weights:
        size = Path(weights.path).stat().st_size
        answers = context.Queue()
        child = context.Process(target=read, args=(weights, answers))
        child.start()
        assert answers.get(timeout=60) == expected
        child.join()
        answers.close()
        answers.join_thread()
    assert size < sum(a.nbytes for a in {id(a): a for a in given.arrays}.values()) + 3 * 64
    assert "kat-ray-weights" not in Path("/proc/self/maps").read_text()
    assert not [f for f in Path("/proc/self/fd").iterdir() if f.is_symlink() and "kat-ray" in str(f.readlink())]


def test_a_name_counts_as_read_where_its_values_are_and_not_where_a_view_is_made():
    tensors = dict(tensors_of(update()))
    with _Reads(tensors) as reads:
        tensors["a"].narrow(0, 1, 2).t()
        assert sorted(reads.unread) == ["a", "b", "c"]
        torch.empty(2, 5).copy_(tensors["a"].narrow(0, 1, 2))
        assert sorted(reads.unread) == ["b", "c"]
        tensors["c"].float()
        assert reads.unread == []


@pytest.mark.parametrize(
    "reports, ignored, missing",
    [([("x", ""), ("", "")], "", ""), ([("x", "p"), ("xy", "q")], "x", "pq"), ([("xy", "")], "xy", "")],
)
def test_a_name_must_serve_one_worker_and_each_worker_needs_all(reports, ignored, missing):
    total = LoadReport.of_all([LoadReport(frozenset(i), frozenset(m)) for i, m in reports])
    assert (total.ignored, total.missing) == (frozenset(ignored), frozenset(missing))
