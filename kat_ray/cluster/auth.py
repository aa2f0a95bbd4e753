"""The token with which Ray is called: whether one is sent, and what is wrong with what the environment says of it.

Ray reads RAY_AUTH_TOKEN, else the file that RAY_AUTH_TOKEN_PATH names, else ~/.ray/auth_token; and sends it only
under RAY_AUTH_MODE = token, which it reads when it is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path

from kat_ray.errors import UserError

_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
WHERE_FROM = (
    "Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it; on Kubernetes it is in the Secret named like "
    "the RayCluster, under auth_token"
)


def choose_mode(environment: MutableMapping[str, str]) -> None:
    """Before Ray is imported to call a cluster that runs: `UserError` for a mode or token that cannot be right."""
    if _MODE not in environment and (environment.get(_TOKEN) or environment.get(_PATH)):
        environment[_MODE] = "token"  # a token without a mode can only mean this
    if wrong := fault(environment):
        raise UserError(wrong)


def fault(environment: Mapping[str, str]) -> str:
    """What is wrong with mode and token for a call to a cluster; empty where nothing is."""
    mode = environment.get(_MODE)
    if mode not in (None, "disabled", "token"):
        return f"RAY_AUTH_MODE = {mode!r}: must be token or disabled"
    if mode != "token" or environment.get(_TOKEN):
        return ""
    path = Path(environment.get(_PATH) or "~/.ray/auth_token").expanduser()
    try:
        if path.read_text(encoding="utf-8").strip():
            return ""
        reason = "is empty"
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or 'not text'})"
    if environment.get(_PATH):
        return f"RAY_AUTH_TOKEN_PATH = {path}: {reason}. {WHERE_FROM}"
    return f"RAY_AUTH_MODE = token, but there is no token: {path} {reason}. {WHERE_FROM}"


def refused(environment: Mapping[str, str]) -> str:
    """Why a cluster let a call with this environment not in, and what to do."""
    if environment.get(_MODE) != "token":
        why = "the cluster asks for a token, and none was sent"
        if environment.get(_MODE) == "disabled":
            why += " (RAY_AUTH_MODE = disabled; unset it)"
        return f"{why}. {WHERE_FROM}"
    source = _TOKEN if environment.get(_TOKEN) else environment.get(_PATH) or "~/.ray/auth_token"
    return f"the cluster does not know this token (of {source}). {WHERE_FROM}"
