"""Make the embedded students and teachers from a seed: `python -m kat_ray.demo.make_models demo --out DIR`.

A plain training loop over the documents of `corpus.py`: Muon for the matrices, AdamW for the rest, right-padded
batches of documents of similar length. One thread, so that the same seed gives the same weights on one machine.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from kat_ray.config.load import resolve_path
from kat_ray.demo.corpus import LONG_STUDENT, LONG_TEACHER, STUDENT, TEACHER, Mixture, documents, partly_told
from kat_ray.demo.problems import write_jsonl
from kat_ray.demo.tokenizer import build_tokenizer, save_tokenizer

_SPARE_POSITIONS = 32  # of a model, beyond the longest document
_POOL = 512  # documents sorted by length together
_IGNORE = -100


@dataclass(frozen=True)
class Recipe:
    """Size, corpus and length of training of one model."""

    mixture: Mixture
    steps: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    document_tokens: int = 224  # prompt and the longest rollout
    batch_tokens: int = 4096
    learning_rate: float = 2e-3  # AdamW's; Muon's is ten times as much
    start: str | None = None  # the embedded model that it goes on from
    told: Mixture | None = None  # of the documents that follow the worked solution, of one that is to read it


def _longer(recipe: Recipe, mixture: Mixture, start: str, steps: int) -> Recipe:
    """The same model goes on with documents of the long task."""
    return replace(
        recipe,
        mixture=mixture,
        start=start,
        steps=steps,
        document_tokens=1120,
        batch_tokens=8192,
        learning_rate=1e-3,
    )


_STUDENT = Recipe(STUDENT, steps=2000, hidden=96, intermediate=256, layers=3, heads=3)
_TEACHER = Recipe(TEACHER, steps=3000, hidden=128, intermediate=352, layers=4, heads=4)
RECIPES = {
    "demo": {"student": _STUDENT, "teacher": _TEACHER},
    "demo-long": {
        "student": _longer(_STUDENT, LONG_STUDENT, "demo:student", steps=700),
        "teacher": _longer(_TEACHER, LONG_TEACHER, "demo:teacher", steps=400),
    },
    "demo-hints": {
        "student": replace(_STUDENT, told=TEACHER, start="demo:student", steps=900, document_tokens=280),
    },
}
WARMUP_STEPS = 50
DECAY_SHARE = 0.4  # of the steps, at the end, linearly


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A model to be trained: new, or with the weights that it goes on from.

    Head size 32, which vLLM's CPU attention takes.
    """
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            head_dim=32,
            max_position_embeddings=recipe.document_tokens + _SPARE_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if recipe.start:
        before = Qwen3ForCausalLM.from_pretrained(resolve_path(recipe.start), dtype=torch.float32)
        model.load_state_dict(before.state_dict())
    return model


def batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Input ids and labels, [B, L] each; labels are _IGNORE where a document is not learnt."""
    rng = random.Random(seed)
    stream = partly_told(recipe.mixture, recipe.told, seed) if recipe.told else documents(recipe.mixture, seed)
    while True:
        pool = sorted(
            (encode(tokenizer, next(stream), recipe.document_tokens) for _ in range(_POOL)), key=lambda d: len(d[0])
        )
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for document in pool:
            if (len(groups[-1]) + 1) * len(document[0]) > recipe.batch_tokens:
                groups.append([])
            groups[-1].append(document)
        rng.shuffle(groups)
        for group in groups:
            yield _padded([d[0] for d in group], 0), _padded([d[1] for d in group], _IGNORE)


def encode(
    tokenizer: PreTrainedTokenizerFast, document: list[tuple[str, bool]], longest: int
) -> tuple[list[int], list[int]]:
    """Ids and labels of a document's pieces, of `longest` tokens at most."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in document:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if learnt else [_IGNORE] * len(piece)
    return ids[:longest], labels[:longest]


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def train(name: str, recipe: Recipe, seed: int) -> Any:
    """Train one model; prints the loss now and then."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    optimisers = [
        torch.optim.Muon(matrices, lr=10 * recipe.learning_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: _factor(s, recipe.steps)) for o in optimisers]
    started, losses = time.monotonic(), []
    for step, (ids, labels) in enumerate(islice(batches(recipe, tokenizer, seed), recipe.steps), 1):
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=_IGNORE)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, scheduler in zip(optimisers, schedulers, strict=True):
            optimiser.step()
            scheduler.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == recipe.steps:
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(
                f"{name} step {step}/{recipe.steps} loss {mean:.4f} {time.monotonic() - started:.0f} s", flush=True
            )
    return model.eval()


def _factor(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, max(0.02, (steps - step) / (DECAY_SHARE * steps)))


def save(model: Any, path: Path) -> None:
    """Write a model with its tokenizer and generation settings."""
    tokenizer = build_tokenizer()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, top_p=0.95
    )
    model.save_pretrained(path)
    save_tokenizer(path)


def _write_data(task: str, folder: Path, seed: int) -> None:
    if task == "demo-hints":
        write_jsonl(folder / "train.jsonl", "train", 3000, seed, solutions=True)
        return
    write_jsonl(folder / "train.jsonl", "train", 6000, seed)
    write_jsonl(folder / "heldout.jsonl", "heldout", 200, seed)


def main() -> None:
    """Write models, and the data of a task that has its own, below --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(RECIPES), help="whose models")
    parser.add_argument("--out", type=Path, required=True, help="directory for data/ and models/")
    parser.add_argument("--seed", type=int, default=0, help="seed of corpus and weights (default 0)")
    parser.add_argument("--only", choices=("data", "student", "teacher"), help="make only this part")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.task != "demo-long" and args.only in (None, "data"):
        (args.out / "data").mkdir(parents=True, exist_ok=True)
        _write_data(args.task, args.out / "data", args.seed + 1)
    for name, recipe in RECIPES[args.task].items():
        if args.only in (None, name):
            save(train(name, recipe, args.seed), args.out / "models" / name)


if __name__ == "__main__":
    main()
