"""How scorers reach a teacher that a server scores for them: fields of a teacher with `type = http`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from kat_ray.config.cluster import Section

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

Urls = str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class HttpConfig(Section):
    """How a teacher's server is asked (`teacher.type = http`, docs/teachers.md)."""

    model: str | None = Field(None, min_length=1)
    """The name under which a vLLM server has the teacher; null takes the only one that it has."""
    token_env: str | None = None
    """The environment variable that holds the server's token, in the driver's process and on the nodes of scorers.
    The token itself is in no configuration, log or record."""
    token_file: str | None = Field(None, min_length=1)
    """The file that holds the server's token, on the driver's and the scorers' nodes."""
    connect_seconds: float = Field(10.0, gt=0)
    """Seconds in which a connection must stand."""
    answer_seconds: float = Field(120.0, gt=0)
    """Seconds in which one attempt at a request must be answered; it is then tried again."""
    retry_seconds: float = Field(240.0, gt=0)
    """Seconds after which a request that all attempts failed at ends the run. Less than cluster.hang_timeout, or
    its scorer would be taken for one that hangs."""
    concurrency: int = Field(32, ge=1)
    """Requests of one scorer that its server has at the same time, at most; fewer while it says that it has too
    many (429, 503)."""

    @model_validator(mode="after")
    def _one_token(self) -> HttpConfig:
        if self.token_env is not None and self.token_file is not None:
            raise ValueError(
                f"token_env = {self.token_env!r} and token_file = {self.token_file!r}: give one of them"
            )
        if self.token_env is not None and not _VARIABLE.fullmatch(self.token_env):
            # What is no name may be the token itself, and is not shown.
            raise ValueError("token_env: must be the name of an environment variable, such as TEACHER_TOKEN")
        return self


def check_urls(urls: Sequence[str], field: str) -> None:
    """ValueError for an address that requests cannot be sent to."""
    for url in urls:
        if not _is_base(url):
            raise ValueError(
                f"{field} = {url!r}: must be the address of a server as http://HOST:PORT or https://HOST, "
                "without user, query and fragment; a token is named by http.token_env or http.token_file"
            )


def _is_base(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port_is_one = parts.port is None or parts.port > 0
    except ValueError:  # of the port, or of brackets
        return False
    plain = not (parts.query or parts.fragment or "@" in parts.netloc)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain and port_is_one
