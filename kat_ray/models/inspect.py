"""The two models, checked from their files before anything is started. No weights are loaded.

Sizes come from config.json and the headers of the safetensors files; a broken download, a pickle, code in the
model directory, or two models that do not fit together are refused here, in seconds. Left out: context lengths
stretched by rope scaling; `max_position_embeddings` is taken as it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kat_ray.config import Config, ModelConfig, TeacherConfig
from kat_ray.config.load import resolve_path
from kat_ray.config.teachers import section_of
from kat_ray.errors import ModelError
from kat_ray.models.edges import edges_of
from kat_ray.models.lora_targets import MERGE_FIRST, check_targets, require_peft
from kat_ray.models.servers import check_servers
from kat_ray.models.shape import ModelShape, shape_of
from kat_ray.models.support import check_roles, roles_of
from kat_ray.models.tokenizers import compare_tokenizers

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*"]
# One of these holds a tokenizer's vocabulary. Without any, transformers makes up an empty tokenizer.
_VOCABULARIES = ("tokenizer.json", ".model", "vocab.json", "vocab.txt", "tekken.json", ".tiktoken")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_HEADER = 100 * 2**20  # the safetensors format's own limit


@dataclass(frozen=True)
class ModelInfo:
    """One model as its files describe it."""

    path: str  # absolute directory, or hub id
    architecture: str
    vocabulary: int  # rows of the output layer: may exceed the tokenizer's entries
    max_length: int | None  # tokens of prompt and answer together; None where the config does not say
    stop_ids: tuple[int, ...]  # sorted; ids that end a text
    tied: bool  # the output layer is the embedding
    parameters: int | None  # from the safetensors headers; None for pickles and for weights not downloaded
    dtype: str | None  # data type most weights are stored in, as safetensors names it ("BF16")
    shape: ModelShape | None = None  # None where config.json has other names for it
    edges: Mapping[str, int] = field(default_factory=dict)  # see `kat_ray.models.edges`
    config: Any = field(default=None, repr=False, compare=False)  # transformers', of the whole model


@dataclass(frozen=True)
class ModelFacts:
    """The models of a run, fit for each other and for the configuration."""

    student: ModelInfo
    teachers: Mapping[str, ModelInfo]  # each checkpoint that is asked, by the section that names it first
    tokenizer: Any  # the student's
    stop_ids: tuple[int, ...]  # of all models, sorted: the STOP event of the KL
    warnings: tuple[str, ...]
    teacher_tokenizers: Mapping[str, Any] = field(default_factory=dict, repr=False)  # by the names of `teachers`

    @property
    def teacher_tokenizer(self) -> Any:
        """Of the section `teacher`; None without it."""
        return self.teacher_tokenizers.get("teacher")

    def renderers(self, config: Config) -> dict[str, Any]:
        """Tokenizers of the teachers that are given chats by a template of their own, by the teachers' names."""
        section = {name: group.section for group in config.scorer_groups for name in group.teachers}
        return {name: self.teacher_tokenizers[section[name]] for name in config.own_templates}

    @property
    def models(self) -> dict[str, ModelInfo]:
        """The models by the section of the configuration that names them."""
        return {"student": self.student, **self.teachers}

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a rollout and an answer of the student: those of the STOP event that it can choose.

        The KL is indifferent to which of them takes the event's mass. One that did not end the rollout could take
        all of it, and the student would unlearn to stop.
        """
        return tuple(i for i in self.stop_ids if i < self.student.vocabulary)

    @property
    def max_length(self) -> int | None:
        """Tokens that all models take, prompt and answer together; None where none says."""
        return min((m.max_length for m in self.models.values() if m.max_length), default=None)

    def max_prompt_tokens(self, max_tokens: int) -> int | None:
        """Longest prompt that leaves room for `max_tokens` of answer."""
        return None if self.max_length is None else self.max_length - max_tokens

    def check_roles(self, config: Config, longest: int) -> None:
        """`ModelError` where a model cannot play its role in a run whose longest prompt and answer together have
        `longest` tokens.
        """
        check_roles(config, {name: model.config for name, model in self.models.items()}, longest)


def resolve_model(model: ModelConfig) -> str:
    """The model's directory (absolute), or its hub id where no such directory exists."""
    path = resolve_path(model.path)
    if path.is_dir():
        return str(path.resolve())
    if path.is_file():
        raise ModelError(f"{model.path} is a file; a model is a directory with config.json and safetensors")
    if not _HUB_ID.match(model.path) or model.path.startswith("demo:"):
        raise ModelError(f"{model.path}: no such directory")
    return model.path


def load_tokenizer(model: ModelConfig) -> Any:
    """The model's tokenizer (transformers)."""
    directory, names = files_of(model)
    if not any(name.endswith(_VOCABULARIES) for name in names):
        raise ModelError(f"{model.path}: there is no tokenizer (tokenizer.json)")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception for a malformed tokenizer.json
        raise ModelError(f"{model.path}: its tokenizer cannot be loaded: {_first_line(error)}") from error


def check_models(config: Config, ask_servers: bool = True) -> ModelFacts:
    """Inspect the models that are asked; `ModelError` says what does not fit, names the field and what to do.

    Servers that have teachers are asked, too, unless nothing is going to be scored.
    """
    infos: dict[str, ModelInfo] = {}
    tokenizers: dict[str, Any] = {}
    models: dict[str, ModelConfig] = {g.section: g.model for g in config.scorer_groups}
    for section, model in ({"student": config.student} | models).items():
        try:
            infos[section], tokenizers[section] = inspect_model(model)
        except ModelError as error:
            raise ModelError(f"{section}.path: {error}") from error
    student, teachers = infos["student"], {section: infos[section] for section in models}
    if student.vocabulary < config.compared_tokens:
        raise ModelError(
            f"rollout.top_k_logprobs = {config.rollout.top_k_logprobs}: must be <= {student.vocabulary}, the "
            "student's vocabulary (vLLM's engine dies on more)"
        )
    warnings: list[str] = [] if teachers else [*_unread_teachers(config)]
    for section, teacher in teachers.items():
        _check_pair(config, student, teacher, section, tokenizers)
        warnings += stop_id_warnings(config, student, teacher, tokenizers["student"], section)
    merged = tuple(sorted({i for info in infos.values() for i in info.stop_ids}))
    for group in (g for g in config.scorer_groups if g.model.is_remote and ask_servers):
        found = check_servers(config, group, teachers[group.section], student, tokenizers["student"], merged)
        teachers[group.section] = found[0]
        warnings += found[1]
    theirs = {section: tokenizers[section] for section in teachers}
    facts = ModelFacts(student, teachers, tokenizers["student"], merged, tuple(warnings), theirs)
    _check_lengths(config, facts)
    facts.check_roles(config, config.rollout.max_tokens + 1)  # a prompt has one token at least
    if config.learner.lora is not None:
        require_peft()
        check_targets(student.config, config.learner.lora, f"student.path = {config.student.path!r}")
    return facts


def _check_pair(
    config: Config, student: ModelInfo, teacher: ModelInfo, section: str, tokenizers: Mapping[str, Any]
) -> None:
    try:
        compare_tokenizers(tokenizers["student"], tokenizers[section])
    except ModelError as error:
        if section == "teacher":
            raise
        raise ModelError(f"{section}.path: {error}") from error
    # Each model has a row for every entry of the one tokenizer: what differs is padding.
    if teacher.vocabulary < student.vocabulary and "scorer-vllm" in roles_of(config)[section]:
        scorer = "scorer" if section == "teacher" else f"{section}.scorer"
        raise ModelError(
            f"the teacher's vocabulary ({teacher.vocabulary}, {teacher.path}) is smaller than the student's "
            f"({student.vocabulary}, {student.path}), and vLLM does not score ids that its model has no row for: "
            f"use {scorer}.backend = transformers"
        )


def _unread_teachers(config: Config) -> Iterator[str]:
    """A line for each teacher that is named and that nothing asks."""
    for name, teacher in config.all_teachers.items():
        yield (
            f"{section_of(name)}.path = {teacher.path!r} is not read: with objective.opd.weight = 0 and "
            "termination.rule = none nobody asks a teacher"
        )


def inspect_model(model: ModelConfig) -> tuple[ModelInfo, Any]:
    """One model's facts and its tokenizer; `ModelError` without the role's name."""
    directory, names = files_of(model)
    if "adapter_config.json" in names and "config.json" not in names:
        raise ModelError(f"{model.path}: holds adapters, not a model: {MERGE_FIRST}")
    raw = _read_json(directory, "config.json", names)
    _refuse_code(model, raw)
    architecture = _causal_architecture(model, raw)
    parameters, dtype = _weights(model, directory, names)
    whole = _model_config(model, directory)
    text = whole.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise ModelError(f"{model.path}: config.json does not give vocab_size")
    tokenizer = load_tokenizer(model)
    if (highest := max(tokenizer.get_vocab().values(), default=-1)) >= vocabulary:
        raise ModelError(
            f"{model.path}: the tokenizer has id {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), "
            f"the model's vocabulary is {vocabulary}: they do not belong together"
        )
    info = ModelInfo(
        path=resolve_model(model),
        architecture=architecture,
        vocabulary=vocabulary,
        max_length=getattr(text, "max_position_embeddings", None),
        stop_ids=stop_ids(model, directory, names, text, tokenizer, vocabulary),
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        parameters=parameters,
        dtype=dtype,
        edges=edges_of(text),
        shape=shape_of(text),
        config=whole,
    )
    return info, tokenizer


def stop_ids(
    model: ModelConfig, directory: Path, names: Iterable[str], text_config: Any, tokenizer: Any, vocabulary: int
) -> tuple[int, ...]:
    """Ids that end a text: generation_config.json's, or else config.json's, or else the tokenizer's."""
    found: Any = None
    if "generation_config.json" in names:
        found = _read_json(directory, "generation_config.json", names).get("eos_token_id")
    if found is None:
        found = getattr(text_config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise ModelError(
            f"{model.path}: neither generation_config.json, config.json nor the tokenizer names an end-of-text id "
            "(eos_token_id); without one no rollout could end by itself"
        )
    ids = tuple(sorted(set(found if isinstance(found, list | tuple) else [found])))
    if wrong := [i for i in ids if not isinstance(i, int) or not 0 <= i < vocabulary]:
        raise ModelError(f"{model.path}: eos_token_id {wrong[0]!r} is no id of its vocabulary of {vocabulary}")
    return ids


def stop_id_warnings(
    config: Config, student: ModelInfo, teacher: ModelInfo, tokenizer: Any, section: str = "teacher"
) -> tuple[str, ...]:
    """One where the two models end their texts on different ids, with what `rollout.eos` makes of it.

    `section` is where the configuration names the teacher.
    """
    if student.stop_ids == teacher.stop_ids:
        return ()
    who = "the teacher" if section == "teacher" else section
    words = [
        f"{name} ends on " + ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in info.stop_ids)
        for name, info in (("the student", student), (who, teacher))
    ]
    effect = {
        "merged": "rollout.eos = merged compares their sums as one event",
        "mask": "rollout.eos = mask leaves them out of the KL",
        "raw": "rollout.eos = raw compares them id by id, which takes the student's own end-of-text probability "
        "away before it has learnt the teacher's; use merged",
    }[config.rollout.eos]
    return (
        f"the models' stop ids differ: {'; '.join(words)}. Each of them ends the student's rollouts and answers, "
        f"in its checkpoints too (generation_config.json); {who}'s answers end on its own. {effect}",
    )


def _check_lengths(config: Config, facts: ModelFacts) -> None:
    asked = {"rollout.max_tokens": config.rollout.max_tokens}
    if config.evaluation.data is not None:
        asked["evaluation.max_tokens"] = config.eval_max_tokens
    sets = config.evaluation.sets.items()
    asked |= {f"evaluation.sets.{n}.max_tokens": own.max_tokens for n, own in sets if own.max_tokens is not None}
    if facts.max_length is None:
        return
    for name, tokens in asked.items():
        if tokens >= facts.max_length:
            raise ModelError(
                f"{name} = {tokens}: must be < {facts.max_length}, the tokens that {_who(facts)} "
                "(max_position_embeddings), with room for the prompt"
            )


def _who(facts: ModelFacts) -> str:
    return {0: "the student takes", 1: "both models take"}.get(len(facts.teachers), "all models take")


def files_of(model: ModelConfig) -> tuple[Path, frozenset[str]]:
    """Directory with the model's small files, and the names of all its files."""
    resolved = resolve_model(model)
    directory = Path(resolved)
    if not directory.is_dir():
        return _from_hub(model)
    try:
        return directory, frozenset(p.name for p in directory.iterdir())
    except OSError as error:
        raise ModelError(f"{model.path}: the directory cannot be read: {error.strerror}") from error


def _from_hub(model: ModelConfig) -> tuple[Path, frozenset[str]]:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        small = Path(snapshot_download(model.path, revision=model.revision, allow_patterns=_SMALL_FILES))
        if constants.HF_HUB_OFFLINE:
            return small, frozenset(p.name for p in small.iterdir())
        return small, frozenset(HfApi().list_repo_files(model.path, revision=model.revision))
    except (HTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"{model.path}: no such directory here, and no such model could be had from the hub "
            f"({_first_line(error)}). With HF_HUB_OFFLINE=1 only models downloaded before are looked for"
        ) from error


def _read_json(directory: Path, name: str, names: Iterable[str]) -> dict[str, Any]:
    if name not in names:
        raise ModelError(f"{directory}: there is no {name}; it is not a Hugging Face model directory")
    try:
        value = json.loads((directory / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{directory / name}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise ModelError(f"{directory / name}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{directory / name}: not a JSON object")
    return value


def _refuse_code(model: ModelConfig, raw: Mapping[str, Any]) -> None:
    if raw.get("auto_map") and not model.trust_remote_code:
        raise ModelError(
            f"{model.path}: config.json asks to run Python code from the model directory (auto_map); set "
            "trust_remote_code = true for this model if you trust its authors"
        )


def _causal_architecture(model: ModelConfig, raw: Mapping[str, Any]) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

    if "AutoModelForCausalLM" in (raw.get("auto_map") or {}):
        return str(raw["auto_map"]["AutoModelForCausalLM"])
    known = {name for names in causal.values() for name in ([names] if isinstance(names, str) else names)}
    architectures = raw.get("architectures") or []
    for name in architectures:
        if name in known or re.search(r"(ForCausalLM|LMHeadModel)$", str(name)):
            return str(name)
    if not architectures and raw.get("model_type") in causal:
        return str(raw["model_type"])
    shown = ", ".join(map(str, architectures)) or f"model_type {raw.get('model_type')!r}"
    raise ModelError(f"{model.path}: {shown} is not a causal language model (architectures in config.json)")


def _model_config(model: ModelConfig, directory: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(f"{model.path}: transformers cannot read config.json: {_first_line(error)}") from error


def _weights(model: ModelConfig, directory: Path, names: frozenset[str]) -> tuple[int | None, str | None]:
    """Parameters and the most common data type; refuses missing, pickled and cut-off weights."""
    index = "model.safetensors.index.json"
    if index in names:
        shards = sorted(set(_read_json(directory, index, names).get("weight_map", {}).values()))
        if missing := [s for s in shards if s not in names]:
            raise ModelError(f"{model.path}: {index} names {missing[0]}, which is not there")
    else:
        shards = sorted(n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_"))
    if not shards and isinstance(model, TeacherConfig) and model.is_remote:
        return None, None  # its server has them
    if not shards:
        pickles = sorted(n for n in names if n.endswith(_PICKLES))
        if not pickles:
            raise ModelError(f"{model.path}: there are no weights (model.safetensors)")
        if not model.allow_pickle:
            raise ModelError(
                f"{model.path}: its weights are a pickle ({pickles[0]}), which can run code when it is read; "
                "convert them to safetensors, or set allow_pickle = true for this model if you trust its authors"
            )
        return None, None
    sizes: dict[str, int] = {}
    for shard in shards:
        if not (directory / shard).exists():  # a hub model whose weights are not downloaded yet
            return None, None
        for dtype, count in _header_counts(directory / shard):
            sizes[dtype] = sizes.get(dtype, 0) + count
    return sum(sizes.values()), max(sizes, key=lambda d: sizes[d], default=None)


def _header_counts(file: Path) -> list[tuple[str, int]]:
    """(data type, elements) of every tensor, from the file's header alone."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= _MAX_HEADER else None
        if not isinstance(header, dict):
            raise ValueError("no header")
        header.pop("__metadata__", None)
        counts = [(str(t["dtype"]), math.prod(t["shape"])) for t in header.values()]
        end = max((t["data_offsets"][1] for t in header.values()), default=0)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{file}: not a safetensors file (an unfinished download, or a Git LFS pointer?)"
        ) from error
    if (size := file.stat().st_size) != 8 + length + end:
        raise ModelError(
            f"{file}: has {size} bytes, its header asks for {8 + length + end}: the download is broken"
        )
    return counts


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
