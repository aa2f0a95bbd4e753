"""The token of a teacher's server: read where it is used, and held in nothing that is printed, logged or stored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from kat_ray.config.http_teacher import HttpConfig
from kat_ray.errors import UserError


class Token:
    """A secret that shows itself to nobody who prints it, and that no pickle takes along."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """For the header of a request, and to compare."""
        return self._value

    def __repr__(self) -> str:
        return "Token(***)"

    def __reduce__(self) -> str:
        raise TypeError("a token is read where it is used, and sent nowhere")


def read_token(http: HttpConfig, section: str, environment: Mapping[str, str] = os.environ) -> Token | None:
    """The token that a configuration names, None where it names none; `UserError` where it cannot be had."""
    return token_of(http.token_env, http.token_file, f"{section}.http.", environment)


def token_of(
    variable: str | None, file: str | None, prefix: str, environment: Mapping[str, str] = os.environ
) -> Token | None:
    """The token in an environment variable or a file; `prefix` stands before the names of the two in messages."""
    if variable is not None:
        name, text = f"{prefix}token_env = {variable!r}", environment.get(variable)
        if text is None:
            raise UserError(f"{name}: there is no such environment variable in this process; set it to the token")
    elif file is not None:
        name = f"{prefix}token_file = {file!r}"
        try:
            text = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "is no text"
            raise UserError(f"{name}: cannot be read: {reason}") from error
    else:
        return None
    text = text.strip()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise UserError(f"{name}: must hold a token: printable ASCII characters without spaces, on one line")
    return Token(text)
