"""Which kind of server answers at an address."""

from __future__ import annotations

from kat_ray.errors import UserError
from kat_ray.remote.client import Answer, HttpClient, Request
from kat_ray.remote.info import INFO, ServerInfo
from kat_ray.remote.vllm import MODELS, VllmInfo, good_json

_REFUSED = (401, 403)


def identify(client: HttpClient, section: str) -> ServerInfo | VllmInfo:
    """What stands at the client's address; `UserError` where it is neither kat-ray's server nor vLLM's, where it
    refuses the token, or where it does not answer.
    """
    answer = client.ask(Request(INFO))
    _check_token(answer, client, section)
    if answer.status == 200 and (info := ServerInfo.from_json(answer.body, answer.url)) is not None:
        return info
    answer = client.ask(Request(MODELS))
    _check_token(answer, client, section)
    what = f"{section}.url = {client.url!r}"
    if answer.status != 200:
        raise UserError(
            f"{what}: is neither a server of kat-ray (serve-teacher) nor one of vLLM: {answer.url} answers "
            f"{answer.status}: {answer.words}"
        )
    return _vllm(answer, client.http_model, what, section)


def _check_token(answer: Answer, client: HttpClient, section: str) -> None:
    if answer.status in _REFUSED:
        wrong = "refuses the token" if client.has_token else "wants a token"
        raise UserError(
            f"{section}.url = {client.url!r}: the server {wrong} ({answer.status}); name the variable or the file "
            f"that holds it, {section}.http.token_env or {section}.http.token_file"
        )


def _vllm(answer: Answer, wanted: str | None, what: str, section: str) -> VllmInfo:
    listed = good_json(answer, what).get("data")
    models = {
        str(entry["id"]): entry.get("max_model_len")
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, dict) and "id" in entry
    }
    names = ", ".join(sorted(models)) or "none"
    if wanted is not None and wanted not in models:
        raise UserError(f"{section}.http.model = {wanted!r}: the server has no such model; it has {names}")
    if wanted is None and len(models) != 1:
        raise UserError(f"{what}: the server has several models, or none ({names}): set {section}.http.model")
    name = wanted or next(iter(models))
    length = models[name]
    if type(length) is not int:
        raise UserError(
            f"{what}: the server does not say how long a text {name} takes (max_model_len); is it vLLM?"
        )
    return VllmInfo(name, length)
