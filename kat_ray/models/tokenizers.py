"""Whether two models have one tokenizer: the teacher scores the student's token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from kat_ray.errors import ModelError

# Text on which tokenizers with equal vocabularies still differ: normalisation, digits, spaces, added prefixes.
SAMPLES = (
    "answer 42",
    " leading space",
    "two  spaces\tand a tab\nnewline\n\n",
    "1234567890 3.14 -7 1,000",
    "Let $x^2 + \\frac{1}{2} = \\boxed{7}$.",
    "def f(x):\n    return x ** 2  # code",
    "naïve café, Ünïcode, 数学, е́, 🙂",
    "I'm it's DON'T",
)


def compare_tokenizers(student: Any, teacher: Any) -> None:
    """Refuse two tokenizers that differ; the message shows the first difference.

    Which token is called end of text, padding or unknown may differ: see `kat_ray.models.inspect.stop_id_warnings`.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        raise ModelError(_first_vocabulary_difference(ours, theirs))
    for text in sample_texts(student, teacher):
        a, b = list(student(text)["input_ids"]), list(teacher(text)["input_ids"])
        if a != b:
            raise ModelError(
                f"the tokenizers encode {text!r} differently: student {_some(a)}, teacher {_some(b)}. "
                "On-policy distillation scores the student's token ids with the teacher: use models of one family"
            )


def sample_texts(*tokenizers: Any) -> list[str]:
    """Texts that tell tokenizers of equal vocabularies apart, with the added tokens of these."""
    added = sorted({str(token) for t in tokenizers for token in t.added_tokens_decoder.values()})
    return [*SAMPLES, *(f"a{token} b" for token in added)]


def fingerprint(tokenizer: Any) -> str:
    """A digest that is equal where `compare_tokenizers` finds no difference."""
    parts = [sorted(tokenizer.get_vocab().items())]
    texts = [[text, list(tokenizer(text)["input_ids"])] for text in sample_texts(tokenizer)]
    return hashlib.sha256(json.dumps([parts, texts]).encode()).hexdigest()


def _first_vocabulary_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    by_id = [{i: t for t, i in vocabulary.items()} for vocabulary in (ours, theirs)]
    first = min(i for i in {*by_id[0], *by_id[1]} if by_id[0].get(i) != by_id[1].get(i))
    words = [repr(side[first]) if first in side else "nothing" for side in by_id]
    return (
        f"the tokenizers differ: id {first} is {words[0]} for the student and {words[1]} for the teacher "
        f"({len(ours)} and {len(theirs)} entries). The teacher scores the student's token ids: use models of "
        "one family"
    )


def _some(ids: Sequence[int]) -> str:
    return f"{list(ids[:12])}{' ...' if len(ids) > 12 else ''}"
