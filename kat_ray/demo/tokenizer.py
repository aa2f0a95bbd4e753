"""The embedded models' tokenizer: one token for every number, word and sign of the task."""

from __future__ import annotations

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
