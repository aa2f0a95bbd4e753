"""What kat-ray's own server says of itself and its teacher (GET /v1/teacher)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from kat_ray.errors import UserError
from kat_ray.remote.wire import VERSION

HEALTH, INFO, SCORE, PLAIN, CLOSE = (
    "/health", "/v1/teacher", "/v1/teacher/score", "/v1/teacher/plain", "/v1/teacher/close"
)  # fmt: skip
STATE_LOST = 409  # the status of "the past of these rollouts is not held"


@dataclass(frozen=True)
class ServerInfo:
    """A server of kat-ray and its teacher."""

    kat_ray_teacher: int  # version of the messages
    model: str  # as the server's command names it
    architecture: str
    vocabulary: int
    max_length: int  # tokens of prompt and answer together
    stop_ids: tuple[int, ...]
    dtype: str
    backend: str  # `transformers` or `vllm`
    features: bool  # whether it gives overlap, largest probability and most likely id
    entropy: bool  # whether it gives the entropy
    fp32_output: bool
    tokenizer: str  # digest, see `kat_ray.models.tokenizers.fingerprint`
    max_body: int  # bytes of a request
    max_ids: int  # that it scores of a token, stop ids among them
    temperature: bool  # whether it takes another one than 1

    def to_json(self) -> bytes:
        """The body of an answer."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, body: bytes, url: str) -> ServerInfo | None:
        """None where the body is no such answer; `UserError` where it is that of another version."""
        try:
            found: Any = json.loads(body)
        except ValueError:
            return None
        if not isinstance(found, dict) or "kat_ray_teacher" not in found:
            return None
        if found["kat_ray_teacher"] != VERSION or {f.name for f in fields(cls)} - found.keys():
            raise UserError(
                f"{url}: is a teacher's server of another version of kat-ray ({found['kat_ray_teacher']!r}, here "
                f"{VERSION}): install the same kat-ray on both sides"
            )
        known = {f.name: found[f.name] for f in fields(cls)}
        return cls(**known | {"stop_ids": tuple(known["stop_ids"])})
