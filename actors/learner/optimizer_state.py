"""What a learner rank saves of its optimiser and restores: in fp32, by parameter, whatever the ZeRO stage.

DeepSpeed holds master weights and Adam's moments in flat tensors of its own, whole (stage 0) or a rank's part
(stages 1 to 3). A rank saves, of each parameter, the elements that it holds: ranks exchange nothing, and together
they write everything once. Another stage or number of ranks reads the elements that it needs from all files.

`deepspeed.utils.safe_get_full_*` would gather every parameter on every rank; a test compares with it. DeepSpeed's
low-precision weights are always its master weights rounded, so they are not saved but derived again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from actors.learner.model import StudentModel
from kat_ray.run.checkpoint import TRAINING, CheckpointError

FORMAT = 1
MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
_RNG, _CUDA_RNG = "rng/cpu", "rng/cuda"


def file_name(rank: int, world_size: int) -> str:
    """A rank's file, relative to the checkpoint."""
    return f"{TRAINING}/learner-{rank}-of-{world_size}.safetensors"


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + size` of a flattened parameter, as `flat[offset : offset + size]`."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    size: int
    flat: Tensor  # fp32, DeepSpeed's own: what its AdamW knows as a parameter
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """The piece's elements of the flat tensor or of one of its moments: a view, [size]."""
        return flat.detach().view(-1)[self.offset : self.offset + self.size]


def held_pieces(engine: Any, student: StudentModel, rank: int, world_size: int) -> list[Piece]:
    """What this rank saves and restores. With stage 0 every rank holds all, and saves an equal share of it."""
    stage = engine.zero_optimization_stage()
    make = {0: _replicated, 1: _partitioned, 2: _partitioned, 3: _sharded}[stage]
    return list(make(engine, student, rank, world_size))


def _replicated(engine: Any, student: StudentModel, rank: int, world_size: int) -> Iterator[Piece]:
    total = sum(p.numel() for _, p in student.trained_parameters())
    first, last, begin = total * rank // world_size, total * (rank + 1) // world_size, 0
    for (name, parameter), flat in zip(student.trained_parameters(), _flats(engine), strict=True):
        end = begin + parameter.numel()
        low, high = max(first, begin), min(last, end)
        if low < high:
            yield Piece(name, tuple(parameter.shape), low - begin, high - low, flat, low - begin)
        begin = end


def _partitioned(engine: Any, student: StudentModel, rank: int, world_size: int) -> Iterator[Piece]:
    groups = _flats(engine)
    for name, parameter in student.trained_parameters():
        held: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if held is not None:
            own, place = held.lp_fragment_address, held.hp_fragment_address
            flat = groups[held.param_group_index]
            yield Piece(name, tuple(parameter.shape), own.start, own.numel, flat, place.start)


def _sharded(engine: Any, student: StudentModel, rank: int, world_size: int) -> Iterator[Piece]:
    zero: Any = engine.optimizer
    for name, parameter in student.trained_parameters():
        sharded: Any = parameter
        group, offset, size = zero.grad_position[zero.get_param_id(sharded)]
        start = rank * size  # the last ranks' shards end in padding
        size = min(size, sharded.ds_numel - start)
        if size > 0:
            yield Piece(
                name, tuple(sharded.ds_shape), start, size, zero.fp32_partitioned_groups_flat[group], offset
            )


def _flats(engine: Any) -> list[Tensor]:
    """The tensors that AdamW updates, in the order of DeepSpeed's groups; with stage 0 one for each parameter."""
    if engine.zero_optimization_stage() == 3:  # its AdamW is given one group at a time
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in engine.basic_optimizer.param_groups for flat in group["params"]]


class HostCopy:
    """Host memory that is kept from one snapshot to the next.

    Touching fresh memory takes up to three times the CPU of copying into it.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, source: Tensor) -> Tensor:
        """Copy a tensor; the copy is valid until the next of the same name."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            pinned = source.device.type == "cuda"
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
            self._buffers[name] = buffer
        return buffer.copy_(source.detach())


def copy_optimizer(
    engine: Any, pieces: Sequence[Piece], copy: HostCopy, rank: int, world_size: int, optimizer_steps: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of this rank's file. Adam's moments are absent before its first step."""
    tensors, parameters = {}, {}
    for piece in pieces:
        adam = engine.basic_optimizer.state.get(piece.flat, {})
        tensors[f"{MASTER}/{piece.name}"] = copy.take(f"{MASTER}/{piece.name}", piece.of(piece.flat))
        for kind in MOMENTS:
            if kind in adam:
                tensors[f"{kind}/{piece.name}"] = copy.take(f"{kind}/{piece.name}", piece.of(adam[kind]))
        step = int(adam["step"]) if adam else 0
        parameters[piece.name] = {"shape": piece.shape, "start": piece.start, "size": piece.size, "step": step}
    tensors[_RNG] = torch.get_rng_state()
    if torch.cuda.is_initialized():  # this rank computes on a GPU
        tensors[_CUDA_RNG] = torch.cuda.get_rng_state()
    content = {
        "format": FORMAT,
        "rank": rank,
        "world_size": world_size,
        "zero_stage": engine.zero_optimization_stage(),
        "optimizer_steps": optimizer_steps,
        "parameters": parameters,
    }
    return tensors, {"learner": json.dumps(content)}  # one entry: safetensors does not keep their order


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file; a full disk is an `OSError` that names it."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    shape: tuple[int, ...]
    start: int = Field(ge=0)
    size: int = Field(ge=1)
    step: int = Field(ge=0)


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: Literal[1]
    rank: int
    world_size: int = Field(ge=1)
    zero_stage: int
    optimizer_steps: int = Field(ge=0)
    parameters: dict[str, _Part]


class SavedOptimizer:
    """The learner's files of a checkpoint, read on demand; made by `open_saved`."""

    def __init__(self, files: Sequence[Any], contents: Sequence[_Content], path: Path) -> None:
        self._files = files
        self._contents = contents
        self._path = path
        self.world_size = len(files)
        self.optimizer_steps = contents[0].optimizer_steps
        self._where: dict[str, list[tuple[_Part, Any]]] = {}
        for file, content in zip(files, contents, strict=True):
            for name, part in content.parameters.items():
                self._where.setdefault(name, []).append((part, file))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`CheckpointError` where another model was saved; `shapes` are the parameters' by name."""
        saved = {name: parts[0][0].shape for name, parts in self._where.items()}
        wrong = [f"{n} is missing" for n in shapes if n not in saved]
        wrong += [f"{n} is not of this model" for n in saved if n not in shapes]
        wrong += [
            f"{n} has shape {list(saved[n])} instead of {list(shape)}"
            for n, shape in shapes.items()
            if n in saved and saved[n] != shape
        ]
        if wrong:
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"{self._path}: is of another student: {'; '.join(wrong[:3])}{more}; resume with the student.path "
                "that the run was started with"
            )
        for name, shape in shapes.items():
            held = sum(part.size for part, _ in self._where[name])
            if held != torch.Size(shape).numel():
                raise CheckpointError(f"{self._path}: holds {held} elements of {name}, which has {list(shape)}")

    def step(self, name: str) -> int:
        """Steps that Adam had taken for a parameter."""
        return max(part.step for part, _ in self._where[name])

    def fill(self, target: Tensor, kind: str, piece: Piece) -> None:
        """Copy a piece's master weights or one of its moments to `target` [piece.size]; a moment may be absent."""
        for part, file in self._where[piece.name]:
            low = max(part.start, piece.start)
            high = min(part.start + part.size, piece.start + piece.size)
            if low < high and (kind == MASTER or part.step):
                with _as_checkpoint_error(self._path):
                    values = file.get_slice(f"{kind}/{piece.name}")[low - part.start : high - part.start]
                target[low - piece.start : high - piece.start].copy_(values)

    def restore_rng(self, rank: int, world_size: int) -> None:
        """Restore torch's random state; nothing is done where the number of ranks has changed."""
        if world_size == self.world_size:
            with _as_checkpoint_error(self._path):
                file = self._files[rank]
                torch.set_rng_state(file.get_tensor(_RNG))
                if torch.cuda.is_initialized() and _CUDA_RNG in set(file.keys()):
                    torch.cuda.set_rng_state(file.get_tensor(_CUDA_RNG))


@contextmanager
def open_saved(path: Path) -> Iterator[SavedOptimizer]:
    """The learner's state in the checkpoint `path`; `CheckpointError` where its files are not whole."""
    found = sorted((path / TRAINING).glob("learner-*-of-*.safetensors"))
    if not found:
        raise CheckpointError(f"{path}: holds no {TRAINING}/learner-*.safetensors; it cannot be resumed")
    with _as_checkpoint_error(path):
        files = [safe_open(file, framework="pt") for file in found]
    contents = [_content(file, name) for file, name in zip(files, found, strict=True)]
    order = sorted(range(len(contents)), key=lambda i: contents[i].rank)
    world = contents[0].world_size
    if [(contents[i].rank, contents[i].world_size) for i in order] != [(rank, world) for rank in range(world)]:
        raise CheckpointError(
            f"{path}: {TRAINING} does not hold the files of one learner: {[f.name for f in found]}"
        )
    yield SavedOptimizer([files[i] for i in order], [contents[i] for i in order], path)


def _content(file: Any, path: Path) -> _Content:
    try:
        return _Content.model_validate_json((file.metadata() or {}).get("learner", "{}"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: is no learner state of format {FORMAT}: {where}: {first['msg']}") from error


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: the learner's state cannot be read: {error}") from error


@torch.no_grad()
def restore_optimizer(
    engine: Any,
    student: StudentModel,
    saved: SavedOptimizer,
    rank: int,
    world: int,
    beat: Callable[[], object] = lambda: None,
) -> None:
    """Restore master weights, moments and steps, and the weights made from them. All ranks must call it.

    `beat` is called after each parameter.
    """
    stage = engine.zero_optimization_stage()
    saved.check({n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in student.trained_parameters()})
    # With stage 0 a rank saves a share, and needs all.
    pieces = held_pieces(engine, student, *((0, 1) if stage == 0 else (rank, world)))
    _make_adam_state(engine, pieces, saved)
    for piece in pieces:
        saved.fill(piece.of(piece.flat), MASTER, piece)
        adam = engine.basic_optimizer.state.get(piece.flat, {})
        for kind in MOMENTS:
            if kind in adam:
                saved.fill(piece.of(adam[kind]), kind, piece)
        beat()
    if stage == 0:
        for (_, parameter), flat in zip(student.trained_parameters(), _flats(engine), strict=True):
            parameter.copy_(flat)  # in fp32 they are the same tensor
    elif stage < 3:
        engine.optimizer.update_lp_params()
    else:
        zero = engine.optimizer
        zero.checkpoint_event_prologue()  # partitions all parameters
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)  # as its step does
        zero.checkpoint_event_epilogue()  # gathers the small parameters, which every rank holds whole


def _make_adam_state(engine: Any, pieces: Sequence[Piece], saved: SavedOptimizer) -> None:
    """AdamW makes its state in its first step; a resumed one has to find the state that it would have made.

    One flat tensor has one step count. Only stage 0 could have saved several, of parameters that had no gradient
    in some steps: then the largest is taken.
    """
    adam = engine.basic_optimizer.state
    adam.clear()
    for flat in _flats(engine):
        step = max((saved.step(piece.name) for piece in pieces if piece.flat is flat), default=0)
        if step:
            adam[flat] = {"step": torch.tensor(float(step)), **{m: torch.zeros_like(flat) for m in MOMENTS}}
