"""`kat-ray serve-teacher MODEL`: a teacher for runs with `teacher.type = http`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kat_ray.cli.arguments import count_of
from kat_ray.cli.help import ABOUT_SERVE
from kat_ray.errors import UserError

if TYPE_CHECKING:
    from kat_ray.config import ScorerConfig

MIB = 2**20
_DTYPES = ["float32", "bfloat16", "float16"]


def add_serve_teacher(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    serve = add("serve-teacher", _serve, "score for runs over HTTP, as their own scorers would", ABOUT_SERVE)
    serve.add_argument("model", metavar="MODEL", help="model directory, hub id or `demo:teacher`")
    serve.add_argument("--revision", help="of a hub model: branch, tag or commit")
    serve.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the weights (default bfloat16)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=_port, default=8766, help="0 takes a free one (default 8766)")
    serve.add_argument("--token-env", metavar="NAME", help="environment variable with the token that callers need")
    serve.add_argument("--token-file", metavar="FILE", help="file with that token")
    serve.add_argument(
        "--backend", choices=["auto", "transformers", "vllm"], default="auto",
        help="auto takes vllm with --num-gpus, else transformers",
    )  # fmt: skip
    serve.add_argument("--num-gpus", metavar="N", type=float, default=0.0, help="GPUs to use (default 0)")
    serve.add_argument("--threads", metavar="N", type=count_of, help="threads of CPU arithmetic")
    serve.add_argument(
        "--top-k", metavar="N", type=count_of, default=64, help="of vllm: ids of a token (default 64)"
    )
    serve.add_argument("--max-length", metavar="N", type=count_of, help="tokens of prompt and answer together")
    serve.add_argument("--max-batch-tokens", metavar="N", type=count_of, help="tokens of one forward pass")
    serve.add_argument("--tensor-parallel-size", metavar="N", type=count_of, help="of vllm: GPUs of the model")
    serve.add_argument("--gpu-memory-utilization", metavar="SHARE", type=float, help="of vllm: of a GPU's memory")
    serve.add_argument("--cache-block", metavar="N", type=count_of, help="of vllm: tokens of a cache's block")
    serve.add_argument("--fp32-output", action="store_true", help="for runs with numerics.fp32_output_layer")
    serve.add_argument(
        "--max-rollouts", metavar="N", type=count_of, default=4096, help="live ones of all callers (default 4096)"
    )
    serve.add_argument(
        "--max-body-mib", metavar="N", type=count_of, default=256, help="largest request taken (default 256)"
    )
    serve.add_argument(
        "--grace", metavar="SECONDS", type=float, default=30.0, help="for requests under way at the end"
    )
    serve.add_argument("--trust-remote-code", action="store_true", help="run Python code of the model's directory")
    serve.add_argument("--allow-pickle", action="store_true", help="accept weights that are not safetensors")


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 2**16:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 to 65535")
    return port


def _serve(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from kat_ray.config import ModelConfig, ScorerConfig
    from kat_ray.remote.token import token_of

    if args.token_env is not None and args.token_file is not None:
        raise UserError("--token-env and --token-file: give one of them")
    token = token_of(args.token_env, args.token_file, "--")
    asked = ("num_gpus", "backend", "threads", "max_batch_tokens", "tensor_parallel_size", "cache_block",
             "gpu_memory_utilization")  # fmt: skip
    given: dict[str, Any] = {name: getattr(args, name) for name in asked if getattr(args, name) is not None}
    try:
        model = ModelConfig(
            path=args.model, revision=args.revision, dtype=args.dtype, trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
        )  # fmt: skip
        scorer = ScorerConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        field = "-".join(str(part).replace("_", "-") for part in first["loc"])
        raise UserError(f"--{field}: {first['msg']}" if field else str(first["msg"])) from None
    _prepare_process(scorer)
    from actors.teacher.serve import Listening, Served, serve

    served = Served(
        model, scorer, args.top_k, args.max_length, args.fp32_output, args.max_rollouts, args.max_body_mib * MIB
    )
    serve(served, Listening(args.host, args.port, grace_seconds=args.grace), token, _say)
    return 0


def _prepare_process(scorer: ScorerConfig) -> None:
    """As the processes of scorers are, before torch is imported."""
    from kat_ray.cluster.devices import environment_of

    os.environ.update(environment_of(scorer.num_gpus))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if scorer.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(scorer.threads)
        import torch

        torch.set_num_threads(scorer.threads)


def _say(text: str) -> None:
    print(f"{text} (pid {os.getpid()})", flush=True)
