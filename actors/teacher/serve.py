"""`kat-ray serve-teacher`: a model, loaded as a scorer would load it, behind HTTP."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from actors.teacher.backend import max_ids
from actors.teacher.scorer import make_teacher
from actors.teacher.server import Listening, TeacherServer
from actors.teacher.service import Limits, TeacherService
from actors.teacher.settings import ScorerSettings
from kat_ray.config import ModelConfig, RolloutConfig, ScorerConfig
from kat_ray.errors import EngineLost, UserError
from kat_ray.models.inspect import inspect_model, resolve_model
from kat_ray.models.revisions import pinned_model
from kat_ray.models.support import Role, require
from kat_ray.models.tokenizers import fingerprint
from kat_ray.remote.info import ServerInfo
from kat_ray.remote.token import Token
from kat_ray.remote.wire import VERSION

_CLEAN_UP_SECONDS = 10.0


@dataclass(frozen=True)
class Served:
    """What is served, and how."""

    model: ModelConfig
    scorer: ScorerConfig
    top_k: int  # most ids of a token that a run may ask for, beside stop ids; of the vllm backend
    max_length: int | None  # tokens of prompt and answer together; None: what the model takes
    fp32_output: bool
    max_rollouts: int
    max_body: int  # bytes


def serve(served: Served, listening: Listening, token: Token | None, say: Callable[[str], None]) -> None:
    """Load the model and serve it until the process is told to end; `say` is given a line for people."""
    check_host(listening.host, token)
    model = pinned_model(served.model)
    info, tokenizer = inspect_model(model)
    role: Role = "scorer-vllm" if served.scorer.engine == "vllm" else "scorer-transformers"
    longest = served.max_length or info.max_length
    if longest is None:
        raise UserError(f"{model.path}: its configuration does not say how long a text it takes; give --max-length")
    if info.max_length is not None and longest > info.max_length:
        raise UserError(f"--max-length = {longest}: must be <= {info.max_length}, what {model.path} takes")
    require(info.config, role, model.path, longest)
    settings = ScorerSettings(
        teacher=model, teacher_dir=resolve_model(model), stop_ids=info.stop_ids, max_model_len=longest,
        scorer=served.scorer, rollout=RolloutConfig(top_k_logprobs=min(served.top_k, info.vocabulary)),
        fp32_output=served.fp32_output, section="serve-teacher",
    )  # fmt: skip
    teacher, is_vllm = make_teacher(settings), served.scorer.engine == "vllm"
    described = ServerInfo(
        kat_ray_teacher=VERSION, model=model.path, architecture=info.architecture, vocabulary=info.vocabulary,
        max_length=longest, stop_ids=info.stop_ids, dtype=model.dtype, backend=served.scorer.engine, features=True,
        entropy=not is_vllm, fp32_output=served.fp32_output or not is_vllm, tokenizer=fingerprint(tokenizer),
        max_body=served.max_body, temperature=not is_vllm,
        max_ids=max_ids(settings.rollout.top_k_logprobs, info.stop_ids) if is_vllm else info.vocabulary,
    )  # fmt: skip
    service = TeacherService(teacher, model.path, Limits(longest, served.max_rollouts))
    server = TeacherServer(service, described, token, listening)
    guarded = "behind a token" if token is not None else "without a token"
    try:
        asyncio.run(server.serve(lambda url: say(f"serving {model.path} at {url}, {guarded}")))
    except EngineLost:
        _end_at_last()
        raise


def _end_at_last() -> None:
    """End this process even where its clean-up hangs in what is broken."""
    timer = threading.Timer(_CLEAN_UP_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def check_host(host: str, token: Token | None) -> None:
    """`UserError` where other machines could reach a server that lets everybody in."""
    if token is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise UserError(
            f"--host = {host!r}: other machines would reach it, and without a token it answers everybody; name one "
            "with --token-env or --token-file, or listen on 127.0.0.1"
        )
