"""Secrets kept out of what is shown and stored: tokens of the environment, and passwords in addresses.

A secret has a place to stand, the environment. A configuration that holds one is refused; messages and logs that
might carry one (an address, a library's error) pass through `redact`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping

# HF_TOKEN, WANDB_API_KEY, RAY_AUTH_TOKEN, AWS_SECRET_ACCESS_KEY; not TOKENIZERS_PARALLELISM.
_NAMES = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_SHORTEST = 8  # a shorter value would be found in harmless text
# user:password@ of an address, and ?token=... of a query.
_USER = re.compile(r"(?<=://)[^\s/?#@'\"]+@")
_QUERY = re.compile(r"(?<=[?&])((?:[\w.-]*(?:token|key|secret|password|signature))=)[^\s&#'\"]+", re.IGNORECASE)


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with `<NAME>` in place of the value of each secret of the environment, and *** in addresses."""
    values = {
        value: name
        for name, value in (os.environ if environment is None else environment).items()
        if _NAMES.search(name) and len(value) >= _SHORTEST
    }
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, f"<{values[value]}>")
    return _QUERY.sub(r"\1***", _USER.sub("***@", text))


class RedactingFormatter(logging.Formatter):
    """A formatter whose lines, tracebacks included, hold no secret."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
