"""Do the tokens of a stage pull where training went (arXiv 2606.09471, section 3).

For a weight matrix let D be its net update between two checkpoints, U_r and V_r its top r left and right singular
vectors, and G_s the gradient, at the first checkpoint, of the mean reverse KL over the tokens of stage s:

    share_s = ||U_r^T G_s V_r||_F^2 / ||G_s||_F^2        0 to 1; a gradient without a direction gets r^2 / (m n)

over the attention matrices of all layers and the MLP of the last. Several matrices are added up before the
division.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kat_ray.config import Config
from kat_ray.data.prompts import load_prompts
from kat_ray.errors import UserError
from kat_ray.losses.distillation import Distillation
from kat_ray.losses.divergence import tail_and_stop
from kat_ray.losses.fused_head import head_loss
from kat_ray.losses.term import TokenRows
from kat_ray.models.inspect import check_models, resolve_model
from kat_ray.models.load import load_causal_lm
from kat_ray.models.output_layer import output_layer
from kat_ray.models.text_model import text_decoder
from kat_ray.report.phases import PHASES, Phases
from kat_ray.report.run_records import RunRecords
from kat_ray.run.chat_facts import with_chat
from kat_ray.types.records import DEFAULT_TEACHER


@dataclass(frozen=True)
class Evidence:
    """Shares by group of matrices and stage, and what chance would give."""

    shares: Mapping[str, Mapping[str, float]]  # group -> stage -> share
    chance: Mapping[str, float]  # group -> share of a gradient without a direction
    tokens: Mapping[str, int]  # stage -> tokens in its mean
    norms: Mapping[str, float]  # stage -> norm of its gradient over all matrices looked at
    rollouts: int


def checkpoints_of(records: RunRecords, given: Sequence[Path]) -> tuple[Path, Path]:
    """The two checkpoints: those given, else the student as it was and the run's newest."""
    if len(given) == 2:
        return given[0], given[1]
    if given:
        raise UserError("--gradients takes either no directory or two: the first checkpoint and the last")
    steps = [p for p in (records.path / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    if not steps:
        raise UserError(f"{records.path}: holds no checkpoint (checkpoints/step-*), which --gradients needs")
    return Path(resolve_model(records.config.student)), max(steps, key=lambda p: int(p.name[5:]))


def gradient_evidence(records: RunRecords, phases: Phases, first: Path, last: Path, rollouts: int) -> Evidence:
    """Measure the shares on the first `rollouts` rollouts with a trap that were seen to their end.

    The first ones, because they were sampled nearest to the first checkpoint.
    """
    config = records.config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = with_chat(config, check_models(config))
    found = load_prompts(
        config.data, facts.tokenizer, None, teacher=facts.teacher_tokenizer, environment=config.environment
    )
    prompts = {p.prompt_id: p.token_ids for p in found.prompts}
    student = load_causal_lm(config.student, str(first), "float32", "the first checkpoint").to(device)
    after = load_causal_lm(config.student, str(last), "float32", "the last checkpoint")
    assert config.scorer_groups, "without a teacher there are no phases"
    teachers: dict[str, Any] = {}  # by name
    for group in config.scorer_groups:
        model = group.model
        loaded = load_causal_lm(model, resolve_model(model), model.dtype, group.section).to(device)
        teachers |= dict.fromkeys(group.teachers, loaded)
    bases = bases_of(dict(student.named_parameters()), dict(after.named_parameters()))
    candidates = np.flatnonzero(phases.trapped)
    if not len(candidates):
        raise UserError("no rollout that was seen to its end has a trap: there are no stages to compare")
    matrices = [(name, p) for name, p in student.named_parameters() if name in bases]
    sums = {phase: {name: torch.zeros_like(p) for name, p in matrices} for phase in PHASES}
    counts = dict.fromkeys(PHASES, 0)
    names, tokens = records.per_rollout("prompt_id"), records.per_rollout("token_ids")
    scored_by = records.per_rollout("teacher")
    for i in candidates[:rollouts].tolist():
        span = slice(int(phases.traces.offsets[i]), int(phases.traces.offsets[i + 1]))
        row = int(phases.rows[i])
        ids = tokens[row][: span.stop - span.start]
        prompt = prompts.get(names[row])
        if prompt is None:
            raise UserError(
                f"--gradients: rollout {int(phases.traces.rollout_id[i])} answered prompt {names[row]}, which "
                f"data.path = {config.data.path} no longer holds: the data must be those of the run"
            )
        for code, phase in enumerate(PHASES):
            mask = phases.stage[span] == code
            if mask.any():
                counts[phase] += int(mask.sum())
                teacher = teachers[scored_by[row] or DEFAULT_TEACHER]
                _add_gradient(sums[phase], student, teacher, prompt, ids, mask, config, facts.stop_ids)
    shares = {
        group: {phase: _share(sums[phase], bases, members) for phase in PHASES if counts[phase]}
        for group, members in groups_of(bases).items()
    }
    chance = {
        group: float(np.mean([_chance(bases[m]) for m in members])) for group, members in groups_of(bases).items()
    }
    norms = {phase: _norm(sums[phase]) / max(1, counts[phase]) for phase in PHASES}
    return Evidence(shares, chance, counts, norms, len(candidates[:rollouts]))


def bases_of(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Top singular vectors (U_r [m, r], V_r [n, r]) of the net update of each matrix looked at.

    r is a sixteenth of the smaller side, at least 1. A matrix that did not move has no direction and is left out.
    """
    layers = [int(part) for name in before for part in name.split(".") if part.isdigit()]
    last_mlp = f".{max(layers, default=0)}.mlp."
    bases = {}
    for name, weight in before.items():
        if weight.ndim == 2 and ("attn" in name or last_mlp in name):
            update = after[name].detach().to(weight.device) - weight.detach()
            if update.abs().max() > 0:
                u, _, vh = torch.linalg.svd(update, full_matrices=False)
                rank = max(1, min(update.shape) // 16)
                bases[name] = (u[:, :rank], vh[:rank].T)
    if not bases:
        raise UserError(
            "the two checkpoints have the same attention and MLP matrices: there is no update to look at"
        )
    return bases


def groups_of(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of matrices by group; groups without one are left out."""
    groups = {
        "attention": [n for n in names if "attn" in n],
        "last MLP": [n for n in names if "attn" not in n],
    }
    return {group: members for group, members in groups.items() if members}


def projected(gradient: Tensor, basis: tuple[Tensor, Tensor]) -> float:
    """||U_r^T G V_r||_F^2."""
    u, v = basis
    return float((u.T @ gradient @ v).double().square().sum())


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return float(sum(g.double().square().sum() for g in gradients.values())) ** 0.5


def _chance(basis: tuple[Tensor, Tensor]) -> float:
    u, v = basis
    return u.shape[1] ** 2 / (u.shape[0] * v.shape[0])


def _share(sums: Mapping[str, Tensor], bases: Mapping[str, tuple[Tensor, Tensor]], members: Sequence[str]) -> float:
    whole = sum(float(sums[m].double().square().sum()) for m in members)
    return sum(projected(sums[m], bases[m]) for m in members) / whole if whole else 0.0


def _add_gradient(
    sums: dict[str, Tensor],
    student: Any,
    teacher: Any,
    prompt: Sequence[int],
    tokens: Sequence[int],
    mask: np.ndarray,
    config: Config,
    stop_ids: Sequence[int],
) -> None:
    """Add the gradient of the summed KL over the masked tokens of one rollout."""
    device = next(student.parameters()).device
    ids = torch.tensor([[*prompt, *tokens]], device=device)[:, :-1]
    start = len(prompt) - 1
    with torch.no_grad():
        q = torch.log_softmax(teacher(input_ids=ids, use_cache=False).logits[0, start:].float(), -1)
    layer = output_layer(student)
    hidden = text_decoder(student)(input_ids=ids, use_cache=False)[0][0, start:]
    top = layer.logits(hidden).topk(config.rollout.top_k_logprobs, dim=-1).indices
    zeros = torch.zeros(len(tokens), device=device)
    tail, stop = tail_and_stop(q, top, stop_ids)
    rows = TokenRows(
        topk_ids=top,
        teacher_topk=q.gather(-1, top),
        teacher_tail=tail,
        teacher_stop=stop,
        token_ids=torch.tensor(tokens, device=device),
        sampled_logprobs=zeros,
        weights=torch.from_numpy(mask.astype(np.float32)).to(device),
    )
    term = Distillation(tuple(stop_ids), config.rollout.eos)
    loss = head_loss(hidden, layer, rows, term, config.learner.logits_chunk_tokens).loss
    student.zero_grad(set_to_none=True)
    loss.backward()
    for name, parameter in student.named_parameters():
        if name in sums and parameter.grad is not None:
            sums[name] += parameter.grad
