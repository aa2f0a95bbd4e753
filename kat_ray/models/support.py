"""Which model can play which role, decided from config.json alone: asked before a run, and again by each actor.

A role is refused where its engine would compute another model than a plain forward pass of transformers does, or
none at all. What the configuration does not tell, actors find when they load the weights. docs/models.md shows what
was tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from kat_ray.config import Config, LearnerConfig, ModelConfig
from kat_ray.errors import ModelError

Role = Literal["sampler-cpu", "sampler-gpu", "learner", "learner-packed", "scorer-transformers", "scorer-vllm"]
ROLES: tuple[Role, ...] = get_args(Role)

_PHRASES: Mapping[Role, str] = {
    "sampler-cpu": "samplers on CPUs (vLLM) cannot generate with this model",
    "sampler-gpu": "samplers (vLLM) cannot generate with this model",
    "learner": "the learner cannot train this model",
    "learner-packed": "the learner cannot train this model in packed rows (learner.batching)",
    "scorer-transformers": "scorers on transformers cannot score with this model",
    "scorer-vllm": "scorers on vLLM cannot score with this model",
}
# Attention whose keys the slots of a scorer can hold: which of them a token sees is the mask's matter.
_KEPT_KEYS = {"full_attention", "sliding_attention", "chunked_attention"}
# Families whose attention makes more of a mask than to pass it on, by the name of their configuration.
_OWN_MASKS: Mapping[str, str] = {"doge": "its attention makes a mask of its own from the values"}
# Families whose attention asks more of a cache than to keep what it stores, likewise.
_OWN_ATTENTION: Mapping[str, str] = {
    **_OWN_MASKS,
    "diffllama": "its attention splits values after they are stored",
}
# Families whose gradients are not finite in a padded batch, by the name of their text model's configuration.
_NO_GRADIENTS: Mapping[str, str] = {
    "gemma3n_text": "its sparse activations have gradients that are NaN at the padding of a batch, so that every "
    "step would be skipped; set learner.batching to packed, which has no padding",
}
# Fields under which configurations of different families hold the number of experts.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


# By the engine of a group's scorers; what a server can run, it has found out itself.
_SCORER_ROLES: Mapping[str, tuple[Role, ...]] = {
    "transformers": ("scorer-transformers",), "vllm": ("scorer-vllm",), "http": (),
}  # fmt: skip


class Refusal(NamedTuple):
    """Why a model cannot play a role: in two or three words, and as part of a sentence with what to do."""

    kind: str
    reason: str


def refusal(config: Any, role: Role, max_length: int | None = None) -> Refusal | None:
    """Why a model cannot play a role; None where nothing speaks against it.

    `config` is transformers' configuration of the whole model, `max_length` the longest prompt and answer together,
    in tokens.
    """
    return next(_reasons(config, config.get_text_config(), role, max_length), None)


def _reasons(config: Any, text: Any, role: Role, max_length: int | None) -> Iterator[Refusal]:
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", None) is True:
        yield Refusal("looks ahead", "its attention looks ahead of a token")
    if role == "learner" and (reason := _NO_GRADIENTS.get(text.model_type)) is not None:
        yield Refusal("no gradients", reason)
    if role == "learner-packed":
        yield from _packed(config, text)
    if role == "scorer-transformers":
        yield from _slots(config, text)
    if role == "sampler-cpu" and has_experts(text):
        yield Refusal(
            "experts on a CPU",
            "it is a mixture of experts, and vLLM's build for CPUs packs experts when it loads them and does not "
            "when new weights are published: from the second step on another model would generate; use GPUs "
            "(sampler.num_gpus)",
        )
    if max_length is not None:
        # vLLM generates one token after what it scores.
        yield from _rope(text, max_length + (role == "scorer-vllm"))


def has_experts(text: Any) -> bool:
    """Whether a text model's configuration names more than one expert."""
    return any(isinstance(n := getattr(text, name, None), int) and n > 1 for name in _EXPERTS)


def _recurrent_layers(network: Any, text: Any) -> str:
    """Kinds of layers whose state is not keys and values of past tokens; empty where there are none."""
    kinds = set(getattr(text, "layer_types", None) or ())
    if getattr(network, "_is_stateful", False) or kinds - _KEPT_KEYS:
        return ", ".join(sorted(kinds - _KEPT_KEYS)) or "recurrent"
    return ""


def _packed(config: Any, text: Any) -> Iterator[Refusal]:
    """Why sequences in one row cannot be kept apart."""
    network, instead = _class_of(config), "; set learner.batching to auto or padded"
    if shown := _recurrent_layers(network, text):
        yield Refusal(
            "recurrent state",
            f"layers of it ({shown}) keep a state that runs on from one sequence of a row into the next{instead}",
        )
    if (reason := _OWN_MASKS.get(text.model_type)) is not None:
        yield Refusal("own attention", f"{reason}{instead}")
    if network is not None and not network._can_set_attn_implementation():
        yield Refusal(
            "own attention", f"{network.__name__} does not use transformers' attention interface{instead}"
        )


def _slots(config: Any, text: Any) -> Iterator[Refusal]:
    """Why the transformers backend, whose cache is keys and values in slots, cannot hold a model's past."""
    network = _class_of(config)
    instead = "; use scorer.backend = vllm on GPUs"
    if shown := _recurrent_layers(network, text):
        yield Refusal(
            "recurrent state",
            f"layers of it ({shown}) keep a state that is not keys and values of past tokens{instead}",
        )
    if getattr(text, "kv_lora_rank", None):
        yield Refusal(
            "MLA",
            f"its attention keeps compressed keys and values (MLA, kv_lora_rank = {text.kv_lora_rank}){instead}",
        )
    if (reason := _OWN_ATTENTION.get(text.model_type)) is not None:
        yield Refusal("own attention", f"{reason}{instead}")
    if network is not None and not network._can_set_attn_implementation():
        yield Refusal(
            "own attention", f"{network.__name__} does not use transformers' attention interface{instead}"
        )


def _rope(text: Any, max_length: int) -> Iterator[Refusal]:
    """Rotary frequencies that depend on the longest sequence of a batch, beyond the length where they are fixed."""
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *(v for v in rope.values() if isinstance(v, Mapping))):
        kind = parameters.get("rope_type")
        if kind == "longrope":
            limit = getattr(text, "original_max_position_embeddings", None)
            limit = limit or parameters.get("original_max_position_embeddings")
        elif kind == "dynamic":
            limit = text.max_position_embeddings
        else:
            continue
        if limit is not None and max_length > limit:
            yield Refusal(
                "batch-dependent positions",
                f"its positions are encoded by {kind}, which beyond {limit} tokens changes with the longest "
                f"sequence of a batch, and prompt and answer may have {max_length}: lower rollout.max_tokens "
                "(and evaluation.max_tokens), or leave out the longest prompts",
            )


def _class_of(config: Any) -> Any:
    """The class that transformers loads for a configuration; None for code from a model's directory."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return None


def require(config: Any, role: Role, name: str, max_length: int | None = None) -> None:
    """`ModelError` where a model cannot play a role; `name` is its field and value."""
    if (found := refusal(config, role, max_length)) is not None:
        raise ModelError(f"{name}: {_PHRASES[role]}: {found.reason}")


def require_directory(model: ModelConfig, directory: str, role: Role, name: str, max_length: int | None) -> None:
    """`require` for a directory or hub id, before its weights are loaded."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        directory, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    require(config, role, name, max_length)


def learner_role(learner: LearnerConfig) -> Role:
    """What is asked of a learner's student: packed rows where it must take them, not where it may."""
    return "learner-packed" if learner.batching == "packed" else "learner"


def roles_of(config: Config) -> Mapping[str, tuple[Role, ...]]:
    """The roles that the models play in a run, by the section that names them; teachers where they are asked."""
    roles: dict[str, tuple[Role, ...]] = {
        "student": (
            "sampler-gpu" if config.sampler.num_gpus > 0 else "sampler-cpu", learner_role(config.learner)
        ),
    }  # fmt: skip
    for group in config.scorer_groups:
        roles[group.section] = _SCORER_ROLES[group.engine]
    return roles


def check_roles(config: Config, models: Mapping[str, Any], max_length: int) -> None:
    """`require` for all roles of a run; `models` has transformers' configurations, likewise."""
    paths = {"student": config.student.path} | {g.section: g.model.path for g in config.scorer_groups}
    for section, roles in roles_of(config).items():
        for role in roles:
            require(models[section], role, f"{section}.path = {paths[section]!r}", max_length)
