"""A teacher's server held against what the configuration says of it, before a run starts anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kat_ray.config import Config, ScorerGroup
from kat_ray.errors import ModelError
from kat_ray.models.tokenizers import fingerprint, sample_texts
from kat_ray.remote.client import HttpClient, Request
from kat_ray.remote.info import ServerInfo
from kat_ray.remote.servers import identify
from kat_ray.remote.token import read_token
from kat_ray.remote.vllm import (
    MAX_IDS,
    NO_TEMPERATURE,
    NOT_ENOUGH,
    VllmInfo,
    detokenize_request,
    good_json,
    next_request,
    next_scores,
    tokenize_request,
    top_request,
    top_values,
)
from kat_ray.termination import RULES

if TYPE_CHECKING:
    from kat_ray.models.inspect import ModelInfo

_PATIENCE = 30.0  # seconds for a server that does not answer, before a run


@dataclass(frozen=True)
class _Asked:
    """What a run asks of one teacher's servers."""

    config: Config
    group: ScorerGroup
    model: ModelInfo  # as its files describe it
    student: ModelInfo
    tokenizer: Any  # the student's, which its own is equal to
    stop_ids: Sequence[int]  # of all models

    @property
    def needs(self) -> list[str]:
        """What the rule needs of every token beside the KL."""
        return [*RULES[self.config.termination.rule].needs]

    @property
    def own_top(self) -> str | None:
        """What of the objective needs the teacher's own top k, in messages; None where nothing does."""
        if self.config.objective.opd.support == "teacher":
            return "objective.opd.support = 'teacher'"
        given = self.config.objective.off_policy
        if given.share and given.loss == "distillation":
            return "objective.off_policy.loss = 'distillation'"
        return None

    @property
    def temperature(self) -> float:
        """Of the teacher's side of the loss."""
        return self.config.objective.opd.teacher_temperature

    @property
    def rule(self) -> str:
        """The rule in messages."""
        return f"termination.rule = {self.config.termination.rule!r}"


def check_servers(
    config: Config,
    group: ScorerGroup,
    model: ModelInfo,
    student: ModelInfo,
    tokenizer: Any,
    stop_ids: Sequence[int],
) -> tuple[ModelInfo, list[str]]:
    """The teacher with the length that all its servers take, and warnings.

    `UserError` where one does not answer, has another model, or cannot give what objective and rule need.
    """
    asked = _Asked(config, group, model, student, tokenizer, stop_ids)
    lengths: list[int | None] = []
    warnings: list[str] = []
    http = group.model.http
    http = http.model_copy(update={"retry_seconds": min(_PATIENCE, http.retry_seconds)})
    token = read_token(http, group.section)
    for url in group.model.urls:
        client = HttpClient([url], http, group.section, token)
        try:
            found = identify(client, group.section)
            where = f"{group.section}.url = {url!r}"
            if isinstance(found, ServerInfo):
                _check_own(asked, found, where)
                lengths.append(found.max_length)
            else:
                warnings += _check_vllm(asked, found, client, where)
                lengths.append(found.max_model_len - 1)  # it generates one token after what it scores
        finally:
            client.close()
    known = [n for n in (*lengths, model.max_length) if n is not None]
    return replace(model, max_length=min(known)), warnings


def _check_own(asked: _Asked, server: ServerInfo, where: str) -> None:
    """A server of kat-ray."""
    section, model = asked.group.section, asked.model
    if server.tokenizer != fingerprint(asked.tokenizer):
        raise ModelError(
            f"{where}: its model, {server.model}, has another tokenizer than the student and {section}.path"
        )
    for name, own, wanted in (
        ("vocabulary", server.vocabulary, model.vocabulary),
        ("stop ids", server.stop_ids, model.stop_ids),
        ("data type", server.dtype, asked.group.model.dtype),
    ):
        if own != wanted:
            raise ModelError(
                f"{where}: its model, {server.model}, is another one than {section} says: {name} {own} in place of "
                f"{wanted}; name the same model, with {section}.dtype = {server.dtype}"
            )
    lacking = [n for n in asked.needs if not (server.entropy if n == "teacher_entropy" else server.features)]
    if lacking:
        raise ModelError(
            f"{asked.rule}: it needs {', '.join(lacking)} of every token, which {where} does not report: start the "
            "server with --backend transformers, or take another rule"
        )
    if asked.config.numerics.fp32_output_layer and not server.fp32_output:
        raise ModelError(
            f"{where}: numerics.fp32_output_layer = true, and the server's is not: start it with --fp32-output"
        )
    if asked.temperature != 1 and not server.temperature:
        raise ModelError(
            f"objective.opd.teacher_temperature = {asked.temperature:g}: takes the teacher's whole distribution, "
            f"and the engine of {where} gives log-probabilities of single ids: start the server with "
            "--backend transformers, or leave the temperature at 1"
        )
    if server.backend == "vllm":
        _check_padding(asked, where)
        most = server.max_ids - len(asked.stop_ids)
        if (top_k := asked.config.rollout.top_k_logprobs) > most:
            raise ModelError(
                f"rollout.top_k_logprobs = {top_k}: must be <= {most} with {where}, which scores {server.max_ids} "
                "ids of a token, the stop ids among them: start the server with a larger --top-k"
            )


def _check_padding(asked: _Asked, where: str) -> None:
    if asked.model.vocabulary < asked.student.vocabulary:
        raise ModelError(
            f"{where}: the teacher's vocabulary ({asked.model.vocabulary}) is smaller than the student's "
            f"({asked.student.vocabulary}), and vLLM does not score ids that its model has no row for: use "
            "kat-ray serve-teacher --backend transformers"
        )


def _check_vllm(asked: _Asked, server: VllmInfo, client: HttpClient, where: str) -> Iterator[str]:
    """A stock vLLM server; yields warnings."""
    config = asked.config
    if asked.needs:
        raise ModelError(
            f"{asked.rule}: it needs {', '.join(asked.needs)} of every token, which a vLLM server does not give "
            "beside the log-probabilities of chosen ids: use kat-ray serve-teacher, or another rule"
        )
    if config.numerics.fp32_output_layer:
        raise ModelError(
            f"{where}: numerics.fp32_output_layer = true: a vLLM server does not say whether its own is; use "
            "kat-ray serve-teacher --fp32-output"
        )
    if asked.temperature != 1:
        raise ModelError(
            f"objective.opd.teacher_temperature = {asked.temperature:g}: with {where} it cannot be: it "
            f"{NO_TEMPERATURE}"
        )
    _check_padding(asked, where)
    most = MAX_IDS - len(asked.stop_ids)
    if config.rollout.top_k_logprobs > most:
        raise ModelError(
            f"rollout.top_k_logprobs = {config.rollout.top_k_logprobs}: must be <= {most} with {where}: a vLLM "
            f"server scores {MAX_IDS} ids of a token, the stop ids among them, and {NOT_ENOUGH}"
        )
    ids = range(min(config.rollout.top_k_logprobs + len(asked.stop_ids), asked.model.vocabulary))
    next_scores(client.ask(next_request(server.model, [0], ids)), ids, where)
    _check_own_top(asked, server, client, where)
    yield from _check_tokenizer(asked, server, client, where)


def _check_own_top(asked: _Asked, server: VllmInfo, client: HttpClient, where: str) -> None:
    if asked.own_top is None:
        return
    top_k = asked.config.rollout.top_k_logprobs
    answer = client.ask(top_request(server.model, [0, 0], top_k))
    if answer.status == 400:
        raise ModelError(
            f"{asked.own_top}: needs the teacher's {top_k} most likely ids (rollout.top_k_logprobs), which {where} "
            f"does not give: {answer.words}: start the server with --max-logprobs {top_k}, or lower "
            "rollout.top_k_logprobs"
        )
    top_values(answer, 2, 1, top_k, where)


def _check_tokenizer(asked: _Asked, server: VllmInfo, client: HttpClient, where: str) -> Iterator[str]:
    tokenizer = asked.tokenizer
    texts = sample_texts(tokenizer)
    ids = sorted(tokenizer.get_vocab().values())
    requests: list[Request] = [tokenize_request(server.model, text) for text in texts]
    *answers, whole = client.ask_all([*requests, detokenize_request(server.model, ids)])
    if any(a.status in (403, 404, 405, 501) for a in (*answers, whole)):
        yield (
            f"{where}: the server has no tokenizer to ask; that its model is the one of {asked.group.section}.path "
            "is not checked"
        )
        return
    for text, answer in zip(texts, answers, strict=True):
        theirs = good_json(answer, where).get("tokens")
        if theirs != (ours := list(tokenizer(text)["input_ids"])):
            raise ModelError(
                f"{where}: the server's tokenizer encodes {text!r} as {theirs}, the student's as {ours}: is its "
                f"model that of {asked.group.section}.path?"
            )
    if good_json(whole, where).get("prompt") != tokenizer.decode(ids):
        raise ModelError(f"{where}: the server's vocabulary is another one than the student's")
