"""A teacher on transformers with a KV cache that outlives calls: every token is run once.

Keys and values of all live rollouts lie in slots, [slots, heads, capacity, head_dim] per layer. A forward pass
takes the new tokens of some slots, ragged and right-padded; the cache layer scatters their keys and values to
each row's own positions and attends over the slots' past. Left out: models whose attention is not causal over
the whole past (sliding windows, linear attention); they are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from actors.teacher_columns import TeacherColumns, columns_of
from kat_ray.config import Config
from kat_ray.errors import UserError
from kat_ray.hf_model import load_causal_lm
from kat_ray.types import RolloutChunk

_FIRST_CAPACITY = 64
_LOGITS_TOKENS = 1024  # tokens whose logits over the vocabulary exist at once


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer for all slots."""

    is_sliding = False

    def __init__(self, shared: _Selection) -> None:
        super().__init__()
        self._shared = shared

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate on the first pass, when heads and width are known."""
        shared = self._shared
        shape = (shared.slots, key_states.shape[1], shared.capacity)
        self.keys = key_states.new_zeros((*shape, key_states.shape[3]))
        self.values = value_states.new_zeros((*shape, value_states.shape[3]))
        self.is_initialized = True

    def fit(self) -> None:
        """Grow to the slots and the capacity now needed."""
        if not self.is_initialized:
            return
        shared = self._shared
        for name in ("keys", "values"):
            old = getattr(self, name)
            if old.shape[0] < shared.slots or old.shape[2] < shared.capacity:
                new = old.new_zeros((shared.slots, old.shape[1], shared.capacity, old.shape[3]))
                new[: old.shape[0], :, : old.shape[2]] = old
                setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store [B, heads, n, width] at each row's positions; returns the batch's past, [B, heads, L, width]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        s = self._shared
        # Padded columns all write to one spare position beyond every row's past, which the mask hides.
        self.keys[s.rows_B1, :, s.positions_BN] = key_states.transpose(1, 2)
        self.values[s.rows_B1, :, s.positions_BN] = value_states.transpose(1, 2)
        return self.keys[s.rows_B, :, : s.length], self.values[s.rows_B, :, : s.length]

    def get_seq_length(self) -> int:
        """Length of the longest past in the batch."""
        return 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Key length and offset; the mask is given in full, so transformers does not make one."""
        return self._shared.length, 0

    def get_max_cache_shape(self) -> int:
        """No fixed size."""
        return -1

    def get_max_length(self) -> int:
        """No fixed size."""
        return -1


@dataclass
class _Selection:
    """Which slots a pass runs on, shared by all layers."""

    slots: int = 0
    capacity: int = _FIRST_CAPACITY
    length: int = 0
    rows_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    rows_B1: Tensor = field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.long))
    positions_BN: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))


class SlotCache(Cache):
    """Slots for rollouts: taken, written by forward passes, freed."""

    def __init__(self, layers: int) -> None:
        self.selection = _Selection()
        super().__init__(layers=[_SlotLayer(self.selection) for _ in range(layers)])
        self._free: list[int] = []

    def take(self) -> int:
        """A slot for a new rollout."""
        if not self._free:
            old = self.selection.slots
            self.selection.slots = max(8, old * 2)
            self._free.extend(range(self.selection.slots - 1, old - 1, -1))
            self._fit()
        return self._free.pop()

    def free(self, slot: int) -> None:
        """Give a slot back; what it holds is overwritten by the next rollout."""
        self._free.append(slot)

    def select(self, slots: Sequence[int], positions_BN: Tensor, length: int) -> None:
        """Set up a pass: `length` is the longest past including the new tokens, padding excluded."""
        s = self.selection
        if length + 1 > s.capacity:
            while s.capacity < length + 1:
                s.capacity *= 2
            self._fit()
        s.rows_B = torch.tensor(slots, dtype=torch.long, device=positions_BN.device)
        s.rows_B1, s.positions_BN, s.length = s.rows_B[:, None], positions_BN, length

    def _fit(self) -> None:
        for layer in self.layers:
            layer.fit()

    @property
    def bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(
            2 * layer.keys.numel() * layer.keys.element_size() for layer in self.layers if layer.is_initialized
        )


@dataclass(frozen=True)
class _Feed:
    """Tokens of one rollout to run: `past` tokens are in its slot; the last `wanted` give a row each."""

    slot: int
    past: int
    token_ids: Sequence[int]
    wanted: int


@dataclass
class _State:
    """A live rollout: `fed` tokens are in its slot, `pending` is its last token, not yet run."""

    slot: int
    fed: int
    pending: int


class TransformersTeacher:
    """The model, its slots, and which rollout lies in which."""

    def __init__(self, config: Config, model_dir: str, stop_ids: tuple[int, ...]) -> None:
        teacher = config.teacher
        self._model = load_causal_lm(teacher, model_dir, teacher.dtype, "teacher")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)
        model_config = self._model.config
        kinds = set(getattr(model_config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise UserError(
                f"teacher.path = {teacher.path!r}: its layers attend by {', '.join(sorted(kinds))}; the "
                "transformers backend scores models with full attention only. Use scorer.backend = vllm on a GPU."
            )
        self._cache = SlotCache(model_config.num_hidden_layers)
        self._budget = config.scorer.max_batch_tokens
        self._stop_ids = stop_ids
        self._states: dict[int, _State] = {}
        self.run_tokens = 0

    @property
    def held(self) -> int:
        """Rollouts with a state."""
        return len(self._states)

    @property
    def cache_bytes(self) -> int:
        """Memory of all slots."""
        return self._cache.bytes

    def release(self, rollout_ids: Sequence[int]) -> None:
        """Forget rollouts; unknown ones are ignored."""
        for rollout_id in rollout_ids:
            if (state := self._states.pop(rollout_id, None)) is not None:
                self._cache.free(state.slot)

    @torch.inference_mode()
    def score(self, chunk: RolloutChunk) -> TeacherColumns:
        """The teacher's columns for all rows of a chunk.

        ValueError names rollouts whose past is not held: send them again with their context.
        """
        feeds = self._feeds(chunk)
        hidden: dict[int, Tensor] = {}
        self._run(feeds, hidden.__setitem__)
        self.run_tokens += sum(len(f.token_ids) for f in feeds)
        parts = []
        rows = [hidden[i] for i in range(len(feeds)) if feeds[i].wanted]
        if rows:
            hidden_NH = torch.cat(rows)
            for first in range(0, chunk.tokens, _LOGITS_TOKENS):
                part = slice(first, first + _LOGITS_TOKENS)
                ids = torch.from_numpy(chunk.topk_ids[part].astype("int64"))
                parts.append(self.columns(hidden_NH[part], ids))
        self._advance(chunk)
        return TeacherColumns.join(parts, chunk.topk_ids.shape[1])

    def columns(self, hidden_NH: Tensor, ids: Tensor) -> TeacherColumns:
        """Columns from hidden states [N, H] and the student's top-k ids [N, k] int64."""
        return columns_of(self.logprobs(hidden_NH), ids, self._stop_ids)

    def logprobs(self, hidden_NH: Tensor) -> Tensor:
        """Log-probabilities [N, V] float32 over the teacher's whole vocabulary."""
        return torch.log_softmax(self._model.lm_head(hidden_NH).float(), dim=-1).cpu()

    def _feeds(self, chunk: RolloutChunk) -> list[_Feed]:
        """What has to be run for each rollout: its unseen context and all new tokens but the last."""
        unknown = [
            rollout_id
            for i, rollout_id in enumerate(chunk.rollout_ids.tolist())
            if not chunk.context(i).size and rollout_id not in self._states
        ]
        if unknown:
            raise ValueError(f"the past of rollouts {unknown} is not held: send their context")
        feeds = []
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            context, new = chunk.context(i).tolist(), chunk.new_tokens(i).tolist()
            if context:
                self.release([rollout_id])
                self._states[rollout_id] = _State(self._cache.take(), fed=0, pending=-1)
                # A row per new token: after the context, and after each new token but the last.
                tokens = context + new[:-1] if new else context[:-1]
            else:
                tokens = [self._states[rollout_id].pending, *new[:-1]] if new else []
            state = self._states[rollout_id]
            if tokens:
                feeds.append(_Feed(state.slot, state.fed, tokens, wanted=len(new)))
        return feeds

    def _advance(self, chunk: RolloutChunk) -> None:
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            state = self._states[rollout_id]
            context = chunk.context(i)
            tokens = [*context.tolist(), *chunk.new_tokens(i).tolist()]
            if tokens:
                # The pending token was run if any new one came after it.
                state.fed += len(tokens) - (1 if context.size else 0)
                state.pending = tokens[-1]

    def _run(self, feeds: Sequence[_Feed], take_rows: Callable[[int, Tensor], None]) -> None:
        """Run all feeds; `take_rows(i, hidden [wanted, H])` gets the last rows of feed i.

        Feeds of similar length share a pass of at most `scorer.max_batch_tokens`, padding included.
        """
        order = sorted(range(len(feeds)), key=lambda i: (len(feeds[i].token_ids), feeds[i].past))
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and (end + 1 - start) * len(feeds[order[end]].token_ids) <= self._budget:
                end += 1
            self._pass([feeds[i] for i in order[start:end]], order[start:end], take_rows)
            start = end

    def _pass(
        self, feeds: Sequence[_Feed], indices: Sequence[int], take_rows: Callable[[int, Tensor], None]
    ) -> None:
        counts = torch.tensor([len(f.token_ids) for f in feeds])
        pasts = torch.tensor([f.past for f in feeds])
        width, length = int(counts.max()), int((counts + pasts).max())
        ids = torch.zeros(len(feeds), width, dtype=torch.long)
        for b, feed in enumerate(feeds):
            ids[b, : len(feed.token_ids)] = torch.tensor(feed.token_ids)
        column = torch.arange(width)
        real_BN = column < counts[:, None]
        positions_BN = torch.where(real_BN, pasts[:, None] + column, length)
        device = self._device
        self._cache.select([f.slot for f in feeds], positions_BN.to(device), length)
        seen_from = torch.where(real_BN, positions_BN, 0)
        visible_BNL = torch.arange(length) <= seen_from[:, :, None]
        hidden_BNH = self._model.model(
            input_ids=ids.to(device),
            attention_mask=visible_BNL[:, None].to(device),
            position_ids=seen_from.to(device),
            past_key_values=self._cache,
            use_cache=True,
        )[0]
        for b, feed in enumerate(feeds):
            if feed.wanted:
                n = len(feed.token_ids)
                take_rows(indices[b], hidden_BNH[b, n - feed.wanted : n])
