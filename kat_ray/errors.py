"""Mistakes that a user can mend: one clear message each, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """What was wrong, with which value, and what to do; the command line prints it and exits with 2."""


class Stopped(Exception):
    """The run was told to end and has saved what it could; `code` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class ConfigError(UserError):
    """The configuration file or an override cannot be used."""


class DataError(UserError):
    """Prompts or answers cannot be used; file and line are named."""


class ModelError(UserError):
    """A model or its tokenizer cannot be used."""


class RewardError(UserError):
    """A reward function cannot be used, or failed too often; what was learnt so far is worth keeping."""


class StateLost(Exception):
    """An actor was asked about something that it no longer knows: its process is a new one. Never a user's
    mistake.
    """


class EngineLost(Exception):
    """The process has lost its device or its engine for good: it ends with 1. Another one can do its work."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Files are written under `path` inside; where they cannot be, that is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from error
