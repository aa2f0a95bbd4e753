"""Make the embedded student and teacher from a seed: `python -m kat_ray.demo.make_models --out DIR`.

A plain training loop over the documents of `corpus.py`: Muon for the matrices, AdamW for the rest, right-padded
batches of documents of similar length. One thread, so that the same seed gives the same weights on one machine.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from kat_ray.demo.corpus import STUDENT, TEACHER, Mixture, documents
from kat_ray.demo.problems import write_jsonl
from kat_ray.demo.tokenizer import build_tokenizer

MAX_LENGTH = 256
_DOCUMENT_TOKENS = 224  # prompt and the longest rollout
_BATCH_TOKENS = 4096
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


RECIPES = {
    "student": Recipe(STUDENT, steps=2000, hidden=96, intermediate=256, layers=3, heads=3),
    "teacher": Recipe(TEACHER, steps=3000, hidden=128, intermediate=352, layers=4, heads=4),
}
LEARNING_RATE = 2e-3  # AdamW; Muon's is ten times as much
WARMUP_STEPS = 50
DECAY_SHARE = 0.4  # of the steps, at the end, linearly


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Any:
    """An untrained model; head size 32, which vLLM's CPU attention takes."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            head_dim=32,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Input ids and labels, [B, L] each; labels are _IGNORE where a document is not learnt."""
    rng = random.Random(seed)
    stream = documents(recipe.mixture, seed)
    while True:
        pool = sorted((encode(tokenizer, next(stream)) for _ in range(_POOL)), key=lambda d: len(d[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for document in pool:
            if (len(groups[-1]) + 1) * len(document[0]) > _BATCH_TOKENS:
                groups.append([])
            groups[-1].append(document)
        rng.shuffle(groups)
        for group in groups:
            yield _padded([d[0] for d in group], 0), _padded([d[1] for d in group], _IGNORE)


def encode(tokenizer: PreTrainedTokenizerFast, document: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Ids and labels of a document's pieces, cut to the longest rollout."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in document:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if learnt else [_IGNORE] * len(piece)
    return ids[:_DOCUMENT_TOKENS], labels[:_DOCUMENT_TOKENS]


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def train(name: str, seed: int) -> Any:
    """Train one model from scratch; prints the loss now and then."""
    torch.manual_seed(seed)
    recipe, tokenizer = RECIPES[name], build_tokenizer()
    model = build_model(recipe, tokenizer)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    optimisers = [
        torch.optim.Muon(matrices, lr=10 * LEARNING_RATE, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
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
        if step % 250 == 0 or step == recipe.steps:
            mean = sum(losses[-250:]) / len(losses[-250:])
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
    tokenizer.save_pretrained(path)


def main() -> None:
    """Write data and models below --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for data/ and models/")
    parser.add_argument("--seed", type=int, default=0, help="seed of corpus and weights (default 0)")
    parser.add_argument("--only", choices=("data", *RECIPES), help="make only this part")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only in (None, "data"):
        (args.out / "data").mkdir(parents=True, exist_ok=True)
        write_jsonl(args.out / "data" / "train.jsonl", "train", 6000, args.seed + 1)
        write_jsonl(args.out / "data" / "heldout.jsonl", "heldout", 200, args.seed + 1)
    for name in RECIPES:
        if args.only in (None, name):
            save(train(name, args.seed), args.out / "models" / name)


if __name__ == "__main__":
    main()
