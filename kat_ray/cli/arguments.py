"""Values of arguments that a command line can get wrong: types for argparse."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from kat_ray.errors import UserError
from kat_ray.storage.address import Address, Place


def path_of(text: str) -> Path:
    """A path that a file system takes, `~` resolved."""
    from kat_ray.config.load import usable_path

    try:
        return usable_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run_of(text: str) -> Place:
    """A path as `path_of`, or the address of something in a bucket."""
    from kat_ray.config.local_paths import is_bucket_url

    return Address.of(text) if is_bucket_url(text) else path_of(text)


def records_of(run: Place) -> Path:
    """A run's directory; of one in a bucket a folder with what its records are now."""
    from kat_ray.run.stored_copy import copied_records, resolved

    return copied_records(resolved(run)) if isinstance(run, Address) else run


def is_override(text: str) -> bool:
    """Whether an argument is section.field=value, and not the path of something with = in its name."""
    from kat_ray.config import Config

    key, equals, _ = text.partition("=")
    return bool(equals) and (key in Config.model_fields or re.match(r"[a-z_]+\.[^/]*$", key) is not None)


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
