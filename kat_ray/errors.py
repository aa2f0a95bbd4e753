"""Mistakes that a user can mend: one clear message each, never a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """What was wrong, with which value, and what to do; the command line prints it and exits with 2."""


class ConfigError(UserError):
    """The configuration file or an override cannot be used."""


class DataError(UserError):
    """Prompts or answers cannot be used; file and line are named."""


class ModelError(UserError):
    """A model or its tokenizer cannot be used."""
