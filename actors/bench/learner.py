"""The learner against plain matrix products: which share of what the cores can do ends up in the update.

One optimiser step of `Learner.train_step` (DeepSpeed, one rank, float32) on whole rollouts. FLOPs of a step, with P
the weights of all linear layers but the output layer, O those of the output layer (tied or not):

    useful    6 (P + O) x trained tokens; attention, prompts, padding and recomputation count nothing
    hardware  6 P x tokens run, prompts and padding included, + `HEAD_PRODUCTS` x 2 O x trained tokens

The other side computes the same products alone: for each linear layer the forward product and the two of the
backward pass, on as many tokens as a micro-batch has (the output layer: as a chunk of logits has).
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.bench.child import alternate, pair_main, ratio, run_child
from actors.bench.figure import Figure
from actors.bench.pairs import Pair, make_pair
from actors.bench.work import all_kept, chunks_of, random_rollouts, teacher_rows

HEAD_PRODUCTS = 3  # of the output layer for each token: one forward, two gradients; nothing is computed again
GOALS = {("large", "padded"): 0.5, ("large", "packed"): 0.7}  # of the tiny pair overhead decides, not arithmetic
_WORK = {"tiny": (64, (200, 501)), "large": (32, (150, 251))}  # rollouts, and the range of their lengths
_TURNS = {"tiny": 3, "large": 3}


def figures(folder: Path, threads: int = 2) -> list[Figure]:
    """Useful FLOP/s of a training step over FLOP/s of its matrix products, for each pair, padded and packed."""
    found = []
    for name in ("tiny", "large"):
        make_pair(name, folder)
        for batching in ("padded", "packed"):
            owed = [Figure("learner", _name(name, batching), None, GOALS.get((name, batching)))]
            found += run_child(__name__, [folder, name, threads, batching], threads, owed, timeout=300)
    return found


def _name(pair: str, batching: str) -> str:
    packed = ", packed rows" if batching == "packed" else ""
    return f"{pair}: useful FLOP/s of a step over FLOP/s of its matrix products{packed}"


def learner_of(student: Path, threads: int, num_gpus: float = 0.0, batching: str = "padded") -> Any:
    """A learner of one rank in this process, ready to take steps."""
    from actors.learner.learner import Learner
    from actors.learner.settings import LearnerSettings
    from kat_ray.config import Config

    config = Config.model_validate(
        {
            "student": {"path": str(student), "dtype": "float32"},
            "teacher": {"path": str(student), "dtype": "float32"},
            "data": {"path": "unused.jsonl"},
            "learner": {"dtype": "float32", "threads": threads, "num_gpus": num_gpus, "batching": batching},
        }
    )
    learner = Learner(0, LearnerSettings.from_config(config, str(student), (1,)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    learner.start("127.0.0.1", port)
    return learner


@dataclass(frozen=True)
class Counts:
    """What a step runs: weights and tokens."""

    body: int  # weights of the linear layers but the output layer
    head: int
    run: int  # tokens of the forward passes, padding included
    trained: int
    wide: int  # tokens of the largest micro-batch

    @property
    def useful(self) -> float:
        """FLOPs that the update needs."""
        return 6.0 * (self.body + self.head) * self.trained

    @property
    def hardware(self) -> float:
        """FLOPs of all products with weights."""
        return 6.0 * self.body * self.run + 2.0 * HEAD_PRODUCTS * self.head * self.trained


def measure(pair: Pair, threads: int, num_gpus: float = 0.0, batching: str = "padded") -> list[Figure]:
    """The figure of one pair, in this process."""
    learner = learner_of(pair.student, threads, num_gpus, batching)
    model = learner._loaded.student.network
    count, lengths = _WORK[pair.name]
    rollouts = random_rollouts(count, lengths, model.config.vocab_size)
    chunks = list(chunks_of(rollouts, 1 << 30, model.config.vocab_size))
    teacher, kept = [teacher_rows(c) for c in chunks], all_kept(rollouts)
    trained = sum(k.kept for k in kept)

    def step() -> None:
        report = learner.train_step(chunks, teacher, kept, float(trained), 0)
        assert report.tokens == trained, report

    step()  # warms up
    linear = _linear_layers(model)
    counts = _count(learner, linear, chunks, teacher, kept)
    device = learner._loaded.engine.device
    products, product_flops = _products(linear, counts.wide, learner._settings.learner.logits_chunk_tokens, device)
    products()
    own, other = alternate([step, products], _TURNS[pair.name])
    share = counts.useful / product_flops  # of a step's products in those timed alone
    return [
        Figure(
            group="learner",
            name=_name(pair.name, batching),
            value=ratio(other.wall, own.wall) * share,
            goal=GOALS.get((pair.name, batching)),
            detail={
                "rollouts": count,
                "trained_tokens": trained,
                "run_tokens": counts.run,
                "threads": threads,
                "body_weights": counts.body,
                "output_weights": counts.head,
                "useful_gflop_per_s": round(counts.useful / min(own.wall) / 1e9, 1),
                "hardware_gflop_per_s": round(counts.hardware / min(own.wall) / 1e9, 1),
                "product_gflop_per_s": round(product_flops / min(other.wall) / 1e9, 1),
                "hardware_ratio": round(ratio(other.wall, own.wall) * counts.hardware / product_flops, 3),
                "ratio_cpu": round(ratio(other.cpu, own.cpu) * share, 3),
                "tokens_per_s": round(trained / min(own.wall)),
                **own.detail("step"),
                **other.detail("products"),
            },
        )
    ]


def _linear_layers(model: Any) -> Counter[tuple[int, int, bool]]:
    """How many linear layers there are of each shape (out, in, whether it is the output layer)."""
    import torch

    return Counter(
        (*module.weight.shape, module is model.lm_head)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    )


def _count(learner: Any, linear: Counter[tuple[int, int, bool]], chunks: Any, teacher: Any, kept: Any) -> Counts:
    from kat_ray.data.batch import collect_samples

    batches = learner._loaded.collator.micro_batches(collect_samples(chunks, teacher, kept))
    sizes = [b.inputs.input_ids.size for b in batches]
    return Counts(
        body=sum(o * i * n for (o, i, head), n in linear.items() if not head),
        head=sum(o * i * n for (o, i, head), n in linear.items() if head),
        run=sum(sizes),
        trained=sum(k.kept for k in kept),
        wide=max(sizes),
    )


def _products(
    linear: Counter[tuple[int, int, bool]], tokens: int, head_tokens: int, device: Any
) -> tuple[Callable[[], None], float]:
    """A function that computes each layer's three products into ready memory, and its FLOPs."""
    import torch

    jobs: list[tuple[int, Sequence[torch.Tensor]]] = []
    flops = 0.0
    for (rows, columns, head), layers in linear.items():
        n = head_tokens if head else tokens
        with torch.device(device):
            x, w, dy = torch.randn(n, columns), torch.randn(rows, columns), torch.randn(n, rows)
            out = [torch.empty(n, rows), torch.empty(n, columns), torch.empty(rows, columns)]
        # The output layer runs on all tokens, chunk by chunk.
        times = layers * max(1, tokens // n)
        jobs.append((times, [x, w, dy, *out]))
        flops += 6.0 * n * rows * columns * times

    def run() -> None:
        for times, (x, w, dy, y, dx, dw) in jobs:
            for _ in range(times):
                torch.mm(x, w.t(), out=y)
                torch.mm(dy, w, out=dx)
                torch.mm(dy.t(), x, out=dw)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run, flops


if __name__ == "__main__":
    pair_main(lambda pair, threads, batching: measure(pair, threads, batching=batching), "batching")
