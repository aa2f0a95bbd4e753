"""The two pairs of models that the benchmark runs on, written to a folder as any user's models would be.

`tiny` is the embedded pair with room for longer rollouts. `large` is a student of 30 M and a teacher of 100 M
parameters over 32,000 ids with random weights: arithmetic decides there, not overhead, and no rollout ends early.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kat_ray.config.load import resolve_path

MAX_POSITIONS = 1024
VOCABULARY = 32_000
_SIZES = {  # hidden, intermediate, layers, heads of 64
    "student": (384, 1152, 9, 6),
    "teacher": (768, 2304, 10, 12),
}


@dataclass(frozen=True)
class Pair:
    """A student, a teacher and prompts, each a path."""

    name: str
    student: Path
    teacher: Path
    prompts: Path


def make_pair(name: str, folder: Path) -> Pair:
    """The pair of this name below `folder`; made once, then found again."""
    root = folder / name
    pair = Pair(name, root / "student", root / "teacher", root / "prompts.jsonl")
    if not (root / "complete").is_file():
        root.mkdir(parents=True, exist_ok=True)
        {"tiny": _tiny, "large": _large}[name](pair)
        (root / "complete").touch()
    return pair


def _tiny(pair: Pair) -> None:
    for role in ("student", "teacher"):
        target = getattr(pair, role)
        shutil.copytree(resolve_path(f"demo:{role}"), target, dirs_exist_ok=True)
        config = json.loads((target / "config.json").read_text())
        config["max_position_embeddings"] = MAX_POSITIONS
        (target / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy(resolve_path("demo:train"), pair.prompts)


def _large(pair: Pair) -> None:
    tokenizer = _tokenizer(VOCABULARY)
    for seed, role in enumerate(("student", "teacher")):
        model = random_model(role, VOCABULARY, seed)
        model.save_pretrained(getattr(pair, role))
        tokenizer.save_pretrained(getattr(pair, role))
    rng = np.random.default_rng(0)
    with pair.prompts.open("w", encoding="utf-8") as file:
        for _ in range(1000):
            words = rng.integers(2, VOCABULARY, size=rng.integers(8, 33))
            file.write(json.dumps({"prompt": " ".join(f"w{i}" for i in words), "answer": None}) + "\n")


def random_model(role: str, vocabulary: int, seed: int = 0) -> Any:
    """An untrained model of the large pair's sizes over any vocabulary, float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, intermediate, layers, heads = _SIZES[role]
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=64,
            max_position_embeddings=MAX_POSITIONS,
            initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).eval()


def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    ids = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    core = Tokenizer(WordLevel(ids, unk_token="<eos>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
