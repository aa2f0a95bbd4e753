"""Values of arguments that a command line can get wrong: types for argparse."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from kat_ray.errors import UserError


def path_of(text: str) -> Path:
    """A path that a file system takes, `~` resolved."""
    from kat_ray.config.load import usable_path

    try:
        return usable_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def share_of(text: str) -> float:
    """In (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0 and at most 1")
    return value


def count_of(text: str) -> int:
    """At least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return int(text)
