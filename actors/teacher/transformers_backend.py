"""A teacher on transformers with a KV cache that persists between calls: every token is run once.

Keys and values of all live rollouts are in slots (actors/teacher/slot_cache.py). A forward pass takes the new
tokens of some rollouts, one after the other, without padding. What cannot be scored so is refused: by
`kat_ray/models/support.py` from the configuration, and where a model's passes in pieces are not its plain forward
pass (`slot_check.py`) when it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from actors.teacher.backend import RunNeeds, Sequences, TeacherColumns, columns_of
from actors.teacher.settings import ScorerSettings
from actors.teacher.slot_cache import SlotCache, run_spans
from actors.teacher.slot_check import check_slots, refused_by_name
from actors.teacher.slot_groups import takes_together
from actors.teacher.slot_masks import ATTENTION, Span
from kat_ray.cluster.devices import device_of
from kat_ray.errors import StateLost
from kat_ray.losses.divergence import LOG_FLOOR
from kat_ray.models.load import load_causal_lm, plain_logprobs
from kat_ray.models.output_layer import output_layer
from kat_ray.models.support import require_directory
from kat_ray.models.text_model import text_decoder
from kat_ray.models.weight_updates import take_weights
from kat_ray.types.records import FloatArray, IntArray, RolloutChunk, WeightUpdate

_LOGITS = 2**25  # logits in memory at once: tokens x vocabulary, 128 MiB in float32


@dataclass
class _State:
    """A live rollout: `fed` tokens are in its slot, `pending` is its last token, not yet run."""

    slot: int
    fed: int
    pending: int
    lost: bool = False  # its slot holds a token that the teacher does not have


@dataclass
class _Feed:
    """Tokens of one rollout to run, after those in its slot; the last `wanted` give a row each."""

    state: _State
    token_ids: list[int]
    wanted: int
    pending: int  # the token after them, not run yet
    foreign: int | None = None  # index of the first token that the teacher does not have

    def drop_foreign(self, vocabulary: int) -> None:
        """Replace tokens that only the student has a row for: after one, the teacher knows no distribution."""
        if self.token_ids and max(self.token_ids) >= vocabulary:
            self.foreign = next(i for i, token in enumerate(self.token_ids) if token >= vocabulary)
            self.token_ids = [token if token < vocabulary else 0 for token in self.token_ids]

    def known(self, hidden_TH: Tensor) -> Tensor:
        """The hidden states, NaN from the first foreign token of the rollout on."""
        first = 0 if self.state.lost else self.foreign
        if first is None:
            return hidden_TH
        beyond = torch.arange(len(hidden_TH), device=hidden_TH.device) >= first
        return hidden_TH.masked_fill(beyond[:, None], torch.nan)


def logits_tokens(vocabulary: int) -> int:
    """Number of tokens whose logits over the vocabulary are in memory at once."""
    return max(1, _LOGITS // vocabulary)


class TransformersTeacher:
    """The model, and the slots of the rollouts."""

    def __init__(self, settings: ScorerSettings) -> None:
        teacher = settings.teacher
        self._name = settings.model_name
        require_directory(teacher, settings.teacher_dir, "scorer-transformers", self._name, settings.max_model_len)
        self._model = load_causal_lm(teacher, settings.teacher_dir, teacher.dtype, settings.section)
        self._device = device_of(settings.scorer.num_gpus, "scorer")
        self._model.to(self._device)
        self._output_layer = output_layer(self._model)
        self._decoder = text_decoder(self._model)
        text = self._decoder.config
        self._own_vocabulary = int(text.vocab_size)
        self._vocabulary = max(self._own_vocabulary, settings.student_vocabulary)
        self._cache = SlotCache(text.num_hidden_layers, takes_together(self._device))
        self._common = settings.student_vocabulary or None
        self._budget = settings.scorer.max_batch_tokens
        self._stop_ids, self._temperature = settings.stop_ids, settings.temperature
        self._fp32_output = settings.fp32_output  # of the plain pass: scores have it in any case
        self._states: dict[int, _State] = {}
        self.run_tokens = 0
        with refused_by_name(self._name, type(self._model).__name__):
            check_slots(self._decoder, self._cache, self._own_vocabulary)

    @property
    def vocabulary(self) -> int:
        """The student's where that is larger: rows of padding, for which this model has none."""
        return self._vocabulary

    @property
    def held(self) -> int:
        return len(self._states)

    @property
    def cache_bytes(self) -> int:
        """Memory of all slots."""
        return self._cache.bytes

    def release(self, rollout_ids: Sequence[int]) -> None:
        for rollout_id in rollout_ids:
            if (state := self._states.pop(rollout_id, None)) is not None:
                self._cache.free(state.slot)

    def serve(self, run: RunNeeds) -> None:
        self._stop_ids, self._temperature = run.stop_ids, run.temperature
        self._common = run.student_vocabulary or None
        self._vocabulary = max(self._own_vocabulary, run.student_vocabulary)

    def load_weights(self, update: WeightUpdate) -> None:
        self.release(list(self._states))  # of rollouts that were cut, and are let go of late
        take_weights(self._model, update, self._name)

    @torch.inference_mode()
    def score(self, chunk: RolloutChunk, topk_ids: IntArray, own_top: int = 0) -> TeacherColumns:
        """The columns of all rows of a chunk, in its order; `topk_ids` [N, k] int32 are the chunk's, unpacked.

        With `own_top` the targets are those of so many of the teacher's own most likely ids.
        `StateLost` names rollouts whose past is not held: send them again with their whole past.
        """
        feeds = self._feeds(chunk)
        rows = self._run([f for f in feeds if f.token_ids])
        self.run_tokens += sum(len(f.token_ids) for f in feeds)
        parts = []
        if rows:
            hidden_NH = torch.cat(rows)
            step = logits_tokens(self._vocabulary)
            for first in range(0, chunk.tokens, step):
                part = slice(first, first + step)
                ids = torch.from_numpy(topk_ids[part].astype("int64"))
                parts.append(self.columns(hidden_NH[part], ids, own_top))
        for feed in feeds:
            feed.state.fed += len(feed.token_ids)
            feed.state.pending = feed.pending
            feed.state.lost |= feed.foreign is not None
        return TeacherColumns.join(parts, chunk.topk_logprobs.shape[1])

    def plain_logprobs(self, sequences: Sequences) -> list[FloatArray]:
        """By the model's own forward pass, with eager attention, which passes over no cap and no sink."""
        self._decoder.set_attn_implementation("eager")
        try:
            return [plain_logprobs(self._model, *pair, self._device, self._fp32_output) for pair in sequences]
        finally:
            self._decoder.set_attn_implementation(ATTENTION)

    def columns(self, hidden_NH: Tensor, ids: Tensor, own_top: int = 0) -> TeacherColumns:
        """Columns from hidden states [N, H] and the student's top-k ids [N, k] int64.

        Ids that only the student has rows for are padding, which this teacher never chooses. They get the floor
        instead of no mass at all: with -inf, rows whose top k reaches into the padding would be lost.
        """
        columns = columns_of(
            self.logprobs(hidden_NH), ids, self._stop_ids, self._temperature, own_top, self._common
        )
        floored, targets = self._floored(columns.topk, ids), columns.targets
        if targets is not None:
            events = ids if targets.ids is None else targets.ids
            targets = replace(targets, topk=self._floored(targets.topk, events))
        return replace(columns, topk=floored, targets=targets)

    def _floored(self, topk: Tensor, ids: Tensor) -> Tensor:
        return torch.where(ids.cpu() >= self._own_vocabulary, torch.full_like(topk, LOG_FLOOR), topk)

    def logprobs(self, hidden_NH: Tensor) -> Tensor:
        """Log-probabilities [N, V] float32 over the larger of the two models' vocabularies, on the device."""
        own_NV = torch.log_softmax(self._output_layer.logits(hidden_NH), dim=-1)
        return pad(own_NV, (0, self._vocabulary - self._own_vocabulary), value=-torch.inf)

    def _feeds(self, chunk: RolloutChunk) -> list[_Feed]:
        """What to run for each rollout: all that was not run yet, except the last token."""
        unknown = [
            rollout_id
            for rollout_id, whole in zip(chunk.rollout_ids.tolist(), chunk.whole_past.tolist(), strict=True)
            if not whole and rollout_id not in self._states
        ]
        if unknown:
            raise StateLost(f"the past of rollouts {unknown} is not held: send their context")
        feeds, whole_past = [], chunk.whole_past
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            new = chunk.new_tokens(i).tolist()
            tokens = [*chunk.context(i).tolist(), *new]
            if whole_past[i]:
                self.release([rollout_id])
                self._states[rollout_id] = _State(self._cache.take(), fed=0, pending=-1)
            else:
                tokens.insert(0, self._states[rollout_id].pending)
            state = self._states[rollout_id]
            feeds.append(_Feed(state, tokens[:-1], wanted=len(new), pending=tokens[-1]))
        return feeds

    def _run(self, feeds: Sequence[_Feed]) -> list[Tensor]:
        """Run all feeds; returns the wanted rows, [wanted, H] each, in the order of the feeds.

        A pass takes at most `scorer.max_batch_tokens` tokens, or one feed.
        """
        rows: list[Tensor] = []
        group: list[_Feed] = []
        tokens = 0
        for feed in feeds:
            if group and tokens + len(feed.token_ids) > self._budget:
                rows += self._pass(group)
                group, tokens = [], 0
            group.append(feed)
            tokens += len(feed.token_ids)
        return rows + self._pass(group) if group else rows

    def _pass(self, feeds: Sequence[_Feed]) -> list[Tensor]:
        for feed in feeds:
            feed.drop_foreign(self._own_vocabulary)
        spans = [Span(f.state.slot, f.state.fed, len(f.token_ids)) for f in feeds]
        hidden_TH = run_spans(self._decoder, self._cache, spans, [t for f in feeds for t in f.token_ids])
        parts = hidden_TH.split([s.new for s in spans])
        return [f.known(part)[len(part) - f.wanted :] for part, f in zip(parts, feeds, strict=True) if f.wanted]
