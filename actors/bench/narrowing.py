"""What float16 log-probabilities do to d, to the rule's cuts, to the loss and its gradient, on a pair of models.

`python -m actors.bench.narrowing [STUDENT TEACHER PROMPTS]`, by default the embedded pair. The reference is the
same arithmetic on float32 records; both differ from the full vocabulary's KL by what the top k leave out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kat_ray.config.load import resolve_path
from kat_ray.losses.divergence import (
    dequantise,
    event_logprobs,
    is_stop,
    log_add,
    reverse_kl,
    tail_and_stop,
)
from kat_ray.termination.base import NewTokens
from kat_ray.termination.kat import KatTracker
from kat_ray.termination.settings import KatSettings


@dataclass(frozen=True)
class Narrowing:
    """Errors against float32 records; nats unless said otherwise."""

    tokens: int
    d_mean: float
    d_error_mean: float  # mean |error|
    d_error_max: float
    d_error_low: float  # mean |error| of the tenth of the tokens with the smallest d
    d_low: float  # their mean d
    d_negative: float  # most negative d
    window_error_max: float  # of a mean over 16 tokens
    cuts_moved: int  # rollouts whose cut differs
    cuts: int
    loss: float
    loss_error: float  # relative
    gradient_error: float  # |difference| / |gradient| with respect to the logits


def measure(student: Any, teacher: Any, rollouts: Sequence[tuple[list[int], list[int]]], k: int = 64) -> Narrowing:
    """Score rollouts (prompt, tokens) with both kinds of records."""
    stop_ids = (1,)
    values: dict[str, list[np.ndarray]] = {"exact": [], "narrow": []}
    losses, gradients = {"exact": 0.0, "narrow": 0.0}, [0.0, 0.0]
    for prompt, tokens in rollouts:
        p, q = (_rows(model, prompt, tokens) for model in (student, teacher))
        ids = p.topk(min(k, p.shape[-1] - 1), dim=-1).indices
        stops = is_stop(ids, stop_ids)
        sides = [(m.gather(-1, ids), *tail_and_stop(m, ids, stop_ids)) for m in (p, q)]
        for kind in values:
            topk, tail = sides[0][0], log_add(*sides[0][1:])
            own = (topk, tail) if kind == "exact" else dequantise(topk.half(), tail)
            ours = event_logprobs(own[0], own[1], None, stops, "merged")
            d = reverse_kl(ours, _events(sides[1], stops))
            values[kind].append(d.double().numpy())
        exact, rough = (_loss(p, ids, stops, sides[1], stop_ids, kind) for kind in ("exact", "narrow"))
        losses = {"exact": losses["exact"] + exact[0], "narrow": losses["narrow"] + rough[0]}
        gradients[0] += float((exact[1] - rough[1]).square().sum())
        gradients[1] += float(exact[1].square().sum())
    return _summary(values, losses, (gradients[0] / gradients[1]) ** 0.5)


@torch.no_grad()
def _rows(model: Any, prompt: list[int], tokens: list[int]) -> Tensor:
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), dim=-1)


def _events(side: tuple[Tensor, Tensor, Tensor], stops: Tensor) -> Tensor:
    topk, tail, stop = side
    return event_logprobs(topk, tail, stop, stops, "merged")


def _loss(
    p: Tensor, ids: Tensor, stops: Tensor, teacher: tuple[Tensor, ...], stop_ids: tuple[int, ...], kind: str
) -> tuple[float, Tensor]:
    """Summed KL as the learner takes it, and its gradient with respect to the student's logits."""
    if kind == "narrow":
        teacher = dequantise(teacher[0].half(), *teacher[1:])
    logits = p.clone().requires_grad_()
    own = torch.log_softmax(logits, dim=-1)
    events = event_logprobs(own.gather(-1, ids), *tail_and_stop(own, ids, stop_ids), stops, "merged")
    loss = reverse_kl(events, _events((teacher[0], teacher[1], teacher[2]), stops)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    return float(loss.detach()), gradient


def _summary(values: dict[str, list[np.ndarray]], losses: dict[str, float], gradient_error: float) -> Narrowing:
    d, error = (
        np.concatenate(values["exact"]),
        np.abs(np.concatenate(values["narrow"]) - np.concatenate(values["exact"])),
    )
    low = d <= np.quantile(d, 0.1)
    rule = KatSettings(window=16, exempt=8, consecutive=4, min_samples=1, min_steps=0)
    windows = {kind: [_window_means(v, rule.window) for v in rows] for kind, rows in values.items()}
    threshold = float(np.quantile([w.min() for w in windows["exact"] if len(w)], 1 - rule.eta))
    cuts = {}
    for kind, rows in values.items():
        trackers = [KatTracker(rule, threshold, probe=False) for _ in rows]
        for tracker, row in zip(trackers, rows, strict=True):
            tracker.observe(NewTokens(row))
        cuts[kind] = [t.cut for t in trackers]
    return Narrowing(
        tokens=len(d),
        d_mean=float(d.mean()),
        d_error_mean=float(error.mean()),
        d_error_max=float(error.max()),
        d_error_low=float(error[low].mean()),
        d_low=float(d[low].mean()),
        d_negative=float(min(0.0, np.concatenate(values["narrow"]).min())),
        window_error_max=max(
            float(np.abs(a - b).max(initial=0)) for a, b in zip(windows["exact"], windows["narrow"], strict=True)
        ),
        cuts_moved=sum(a != b for a, b in zip(cuts["exact"], cuts["narrow"], strict=True)),
        cuts=sum(c is not None for c in cuts["exact"]),
        loss=losses["exact"] / len(d),
        loss_error=abs(losses["narrow"] / losses["exact"] - 1),
        gradient_error=gradient_error,
    )


def _window_means(d: np.ndarray, width: int) -> np.ndarray:
    sums = np.concatenate([[0.0], np.cumsum(d)])
    return (sums[width:] - sums[:-width]) / width


def sampled(student: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> list[tuple[list[int], list[int]]]:
    """Rollouts drawn from the student, one a prompt, up to its stop id."""
    torch.manual_seed(0)
    rollouts = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        done = student.generate(
            torch.tensor([ids]), max_new_tokens=tokens, do_sample=True, top_p=0.95, top_k=0, pad_token_id=0
        )
        rollouts.append((ids, done[0, len(ids) :].tolist()))
    return rollouts


def main(student_dir: str, teacher_dir: str, prompts: str, count: int = 60, tokens: int = 160) -> Narrowing:
    """Measure on models and prompts (JSONL) from disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (student_dir, teacher_dir)
    )
    lines = Path(prompts).read_text(encoding="utf-8").splitlines()[:count]
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    return measure(student, teacher, sampled(student, tokenizer, [json.loads(x)["prompt"] for x in lines], tokens))


if __name__ == "__main__":
    paths = sys.argv[1:4] or [str(resolve_path(f"demo:{name}")) for name in ("student", "teacher", "train")]
    for name, value in vars(main(paths[0], paths[1], paths[2])).items():
        print(f"{name:18} {value:.3g}" if isinstance(value, float) else f"{name:18} {value}")
