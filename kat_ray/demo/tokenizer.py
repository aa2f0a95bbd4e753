"""The embedded models' tokenizer: one token for every number, word and sign of the task."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split
from transformers import PreTrainedTokenizerFast

from kat_ray.demo.problems import MAX_VALUE

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
WORDS = ("start", "add", "take", "double", "triple", "solve", "check", "answer", "+", "-", "*", "=", "\n")


def vocabulary() -> dict[str, int]:
    """Token to id: specials, words and signs, then the numbers 0..MAX_VALUE."""
    tokens = (PAD, EOS, UNKNOWN, *WORDS, *(str(n) for n in range(MAX_VALUE + 1)))
    return {token: i for i, token in enumerate(tokens)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer; text comes back with single spaces between tokens."""
    core = Tokenizer(WordLevel(vocabulary(), unk_token=UNKNOWN))
    core.pre_tokenizer = Sequence([Split(Regex(" +"), behavior="removed"), Split(Regex("\n"), behavior="isolated")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def save_tokenizer(path: Path) -> None:
    """Write the tokenizer's files so that transformers 4.57 and 5 load them.

    5 names its class by a name that 4.57 does not know, and takes the one that both know for the same.
    """
    build_tokenizer().save_pretrained(path)
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)  # of 5 alone
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
