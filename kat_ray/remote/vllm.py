"""What a stock vLLM server is asked, and what it answers (read in vLLM 0.32's sources, tried on its CPU server).

`logprob_token_ids` of /v1/completions gives log-probabilities of chosen ids, 128 at most, for *generated*
positions, from its unfiltered distribution. So each new token is one request: what stands before it is the prompt,
one token is generated and thrown away. What speaks against the other ways:

- `prompt_logprobs` gives the server's own most likely ids (20, unless it was started with more) and the text's
  own token. Where these do not hold the student's ids, the rest would have to join the tail on both sides: a KL of
  coarser events, which is a lower bound of the KL that is asked for, and by how much depends on the server's list.
  It also runs every prompt whole: a request that asks for it reads no prefix cache. Where the loss is on the
  teacher's own top k, that list is what is asked for, of each rollout once a chunk. `logprobs` of a generated token
  would give it, too, and read the cache; but vLLM's V1 model runner gives nothing to a request with it that runs
  beside one with `logprob_token_ids`.
- `prompt_logprob_token_ids` of /inference/v1/generate scores given ids at all rows at once. It needs a server
  started with --enable-scale-out, and the V2 model runner, so a GPU. Whoever can start one so can start
  `kat-ray serve-teacher` instead, which asks the same engine the same and gives more of each row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kat_ray.errors import UserError
from kat_ray.remote.client import Answer, Request

MAX_IDS = 128  # vLLM's MAX_LOGPROB_TOKEN_IDS
COMPLETIONS, MODELS, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/models", "/tokenize", "/detokenize"
_NO_MASS = -9999.0  # what vLLM writes for the logarithm of 0
_SLACK = 1e-2  # of the logarithm of a sum of probabilities, which is at most 0
# Whatever the server's own defaults are, the distribution is the model's.
_PLAIN = {
    "max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "add_special_tokens": False,
}  # fmt: skip


@dataclass(frozen=True)
class VllmInfo:
    """A vLLM server and the model of it that is asked."""

    model: str
    max_model_len: int


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of ids, NaN where the server has none, and the tokens that it ran for them."""

    logprobs: list[float]
    run: int  # as many as it was sent where it does not tell (--enable-prompt-tokens-details)


def next_request(model: str, tokens: Sequence[int], ids: Sequence[int]) -> Request:
    """Asks for the log-probabilities of `ids`, all different, as the token after `tokens`."""
    asked = {"logprobs": 1, "logprob_token_ids": list(ids), "return_tokens_as_token_ids": True}
    return Request(COMPLETIONS, _json({"model": model, "prompt": list(tokens), **asked, **_PLAIN}))


def next_scores(answer: Answer, ids: Sequence[int], what: str) -> Scored:
    """The answer to `next_request`; `UserError` where the server does not do what was asked. `what` names it."""
    body = good_json(answer, what)
    try:
        given = body["choices"][0]["logprobs"]["top_logprobs"][0]
        found = [_value(given[f"token_id:{i}"]) for i in ids]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{what}: the server does not give log-probabilities of chosen ids (logprob_token_ids of "
            f"/v1/completions), as vLLM 0.32 does: {NOT_ENOUGH}"
        ) from error
    known = [math.exp(v) for v in found if not math.isnan(v)]
    if sum(known) > 1 + _SLACK:
        raise UserError(
            f"{what}: the server's values for {len(ids)} ids are no log-probabilities, they add up to "
            f"{sum(known):.3g}: start it with --logprobs-mode raw_logprobs, vLLM's default"
        )
    usage = body.get("usage") or {}
    sent = int(usage.get("prompt_tokens") or 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Scored(found, sent - int(cached))


NOT_ENOUGH = (
    "its own most likely ids do not suffice, since a KL over those of the student's that are among them is another "
    "one (docs/teachers.md); use a newer vLLM, or kat-ray serve-teacher"
)


NO_TEMPERATURE = (
    "takes the log-probabilities of the whole vocabulary, and a vLLM server gives those of single ids: the mass of "
    "all others at another temperature does not follow from theirs; use kat-ray serve-teacher --backend "
    "transformers, or leave the temperature at 1"
)


def _value(given: Any) -> float:
    if given is None:
        return math.nan
    value = float(given)
    return -math.inf if value <= _NO_MASS else value


def plain_request(model: str, tokens: Sequence[int]) -> Request:
    """Asks for the log-probability of each token of a text given those before it, by a pass without cache."""
    return Request(COMPLETIONS, _json({"model": model, "prompt": list(tokens), "prompt_logprobs": 0, **_PLAIN}))


def plain_values(answer: Answer, tokens: Sequence[int], what: str) -> list[float]:
    """The answer to `plain_request`: [tokens], NaN for the first."""
    body = good_json(answer, what)
    try:
        rows = body["choices"][0]["prompt_logprobs"]
        return [
            math.nan if row is None else _value(row[str(t)]["logprob"]) for t, row in zip(tokens, rows, strict=True)
        ]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{what}: the server does not give the log-probabilities of a prompt") from error


@dataclass(frozen=True)
class OwnTop:
    """The server's own most likely ids of rows, most likely first, and the tokens that it ran for them."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    run: int


def top_request(model: str, tokens: Sequence[int], top: int) -> Request:
    """Asks for the `top` most likely ids at each token of a text, by a pass without cache."""
    return Request(COMPLETIONS, _json({"model": model, "prompt": list(tokens), "prompt_logprobs": top, **_PLAIN}))


def top_values(answer: Answer, tokens: int, rows: int, top: int, what: str) -> OwnTop:
    """The answer to `top_request` about so many tokens, of which the last `rows` are looked at."""
    body = good_json(answer, what)
    try:
        given = body["choices"][0]["prompt_logprobs"]
        if len(given) != tokens:
            raise ValueError(len(given))
        # The text's own token is there in any case, so a row may have one more.
        best = [_most_likely(row, top) for row in given[tokens - rows :]]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{what}: the server does not give its {top} most likely ids at the tokens of a prompt"
        ) from error
    return OwnTop(
        [[i for i, _ in row] for row in best], [[v for _, v in row] for row in best],
        int((body.get("usage") or {}).get("prompt_tokens") or 0),
    )  # fmt: skip


def _most_likely(row: dict[str, Any], top: int) -> list[tuple[int, float]]:
    values = {int(i): _value(entry["logprob"]) for i, entry in row.items()}
    if len(values) < top:
        raise ValueError(len(values))
    # A row of NaN has no order: any ids will do, it is dropped.
    order = sorted(values, key=lambda i: -math.inf if math.isnan(values[i]) else values[i], reverse=True)
    return [(i, values[i]) for i in order[:top]]


def tokenize_request(model: str, text: str) -> Request:
    """Asks for the ids of a text."""
    return Request(TOKENIZE, _json({"model": model, "prompt": text}))


def detokenize_request(model: str, ids: Sequence[int]) -> Request:
    """Asks for the text of ids."""
    return Request(DETOKENIZE, _json({"model": model, "tokens": list(ids)}))


def good_json(answer: Answer, what: str) -> dict[str, Any]:
    """The JSON object of a good answer; `UserError` with the server's words for any other."""
    if answer.status != 200:
        raise UserError(f"{what}: {answer.url} answers {answer.status}: {answer.words}")
    try:
        body = json.loads(answer.body)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UserError(f"{what}: {answer.url} answers with something that is no JSON object")
    return body


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
