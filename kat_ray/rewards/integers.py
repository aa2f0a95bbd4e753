r"""The integer that a text answers with.

The last *stated* answer of the text decides. These state one:

| form | examples |
| --- | --- |
| `answer`, then any of `is`, `:`, `=`, `**`, `$`, `\(` and space, then a number | `answer 42`, `Answer: **42**` |
| a box | `\boxed{42}`, `\boxed{x = 42\text{ cm}}` |
| `####`, then a number, alone on a line | `#### 42` |
| a number in bold, alone on a line | `**42**`, `**$42.**` |

Where none is stated, the last integer of the text is the answer. A stated answer that is no integer (`4.0`, `1/2`,
`2^{10}`, `\boxed{\frac{1}{2}}`) makes the answer unreadable; elsewhere decimals and fractions are passed over.
`1,234`, `1{,}234` and `1,\!234` are one number; `3-5` holds 3 and 5, `3 - -5` 3 and -5.
"""

from __future__ import annotations

import re
from collections import deque

from kat_ray.errors import DataError

# A number as people write it: a minus that is not a subtraction, thousands separated by commas, decimals; with what
# makes more of it than an integer: a fraction, a power.
_NUMBER = (
    r"(?<![0-9A-Za-z_.])(?:(?<![)\]])[-−])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
    r"(?:\.[0-9]+|[ ]?/[ ]?[0-9]+|\^)?"
)
_DOLLAR = r"\\?\$"
_BETWEEN = rf"(?:\s|[`:=]|\*\*|is\b|{_DOLLAR}|\\[(\[]){{0,20}}"  # of `answer` and its number
_NUMBER_RE = re.compile(_NUMBER)
# A model writes what this reads, in the caller's own thread: nothing in it looks at a character more than a few
# times (a test gives it the worst texts).
_STATED_RE = re.compile(
    rf"\banswer\b{_BETWEEN}(?P<answer>{_NUMBER})"
    r"|\\boxed\s*\{(?P<box>(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
    rf"|^####[ \t]*(?:{_DOLLAR})?(?P<hashes>{_NUMBER})(?:[ \t]*\.)?[ \t]*$"
    rf"|^[ \t]*\*\*[ \t]*(?:{_DOLLAR})?(?P<bold>{_NUMBER})(?:{_DOLLAR})?\.?[ \t]*\*\*\.?[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
# Of a box, what is not part of its number: words and units, dollars, percent, degrees, small spaces.
_TRIMMINGS_RE = re.compile(
    r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{[^{}]*\}|\\?[$%]|\^\s*\{?\\circ\}?|\\[,;: ]|~|\s"
)
_THOUSANDS_RE = re.compile(r"\{,\}|,?\\!,?")  # of LaTeX: 1{,}234 and 1,\!234


def extract_integer(text: str) -> str | None:
    """The integer that the text answers with, in plain digits; None where it is unreadable or there is none."""
    text = _THOUSANDS_RE.sub(",", text)
    stated = next(iter(deque(_STATED_RE.finditer(text), maxlen=1)), None)
    if stated is None:
        numbers = [p for p in map(_plain, _NUMBER_RE.findall(text)) if p is not None]
        return numbers[-1] if numbers else None
    if (box := stated["box"]) is None:
        return _plain(stated["answer"] or stated["hashes"] or stated["bold"])
    value = _TRIMMINGS_RE.sub("", box).rpartition("=")[2]
    return _plain(value) if _NUMBER_RE.fullmatch(value) else None


def gold_integer(answer: str) -> str:
    """A gold answer in plain digits; `DataError` where it is no integer.

    `34.0`, as a column with gaps holds 34, is one.
    """
    found = _NUMBER_RE.fullmatch(re.sub(r"\.0+$", "", answer.strip()))
    if found is None or (plain := _plain(found.group())) is None:
        shown = answer if len(answer) <= 80 else f"{answer[:77]}..."
        mend = "use evaluation.verifier = math"
        if "####" in answer:  # as in the columns of openai/gsm8k
            mend = "answer_after = '####' of its data takes what stands behind that mark"
        raise DataError(f"the gold answer {shown!r} is not an integer; {mend}")
    return plain


def _plain(number: str) -> str | None:
    """Digits without separators, leading zeros, or a minus before zero; None where it is no integer.

    Text, not int: Python refuses to convert very long digit strings, which a looping model does write.
    """
    if any(sign in number for sign in "./^"):
        return None
    digits = number.replace(",", "").lstrip("-−").lstrip("0") or "0"
    return f"-{digits}" if number[0] in "-−" and digits != "0" else digits
