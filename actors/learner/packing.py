"""How a student's micro-batches are laid out: padded, or packed where the student computes a packed row exactly.

Whether it does is tried when it is loaded, against its sequences alone. What a configuration does not tell is found
there: attention that does not go through transformers' interface, a state that runs on from one sequence into the
next, positions that are counted along the row, a window that is not kept to.
"""

from __future__ import annotations

import logging

import torch

from actors.learner.model import StudentModel
from kat_ray.cluster.fatal_errors import fatal_reason
from kat_ray.config import LearnerConfig
from kat_ray.data.collate import Collator, PackedCollator, PaddedCollator
from kat_ray.errors import UserError
from kat_ray.models.support import refusal
from kat_ray.models.trial import trial_length, worst_difference

log = logging.getLogger("kat_ray.learner")

# Of a hidden state's norm: rounding gives 1e-6 in float32 and 1e-2 in 16 bits, a neighbour that is seen 0.1 and
# more.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_LONGEST = 1200  # tokens: beyond the windows of Gemma 3, which have 1,024


def collator_for(student: StudentModel, learner: LearnerConfig, name: str) -> Collator:
    """What `learner.batching` asks for; the student is made ready for it. `name` is the student's field and value.

    UserError where packed rows are asked for and the student does not compute them exactly.
    """
    if learner.batching == "padded":
        return PaddedCollator(learner.micro_batch_tokens)
    found = refusal(student.network.config, "learner-packed")
    fault = _tried(student) if found is None else found.reason
    if fault is None:
        return PackedCollator(learner.micro_batch_tokens)
    if learner.batching == "packed":
        raise UserError(f"{name}: learner.batching = 'packed': {fault}; set it to 'auto' or 'padded'")
    log.info("%s: micro-batches are padded: %s", name, fault.split(";")[0])
    return PaddedCollator(learner.micro_batch_tokens)


def _tried(student: StudentModel) -> str | None:
    """What is wrong with packed rows, and nothing is changed; None where nothing is, and the student takes them."""
    student.pack()
    fault = packing_fault(student)
    if fault is not None:
        student.unpack()
    return fault


@torch.no_grad()
def packing_fault(student: StudentModel) -> str | None:
    """What is wrong with packed rows of a student that takes them, as part of a sentence; None where nothing is."""
    device, text = student.network.device, student.network.config.get_text_config()
    lengths = (9, 1, trial_length(text, _LONGEST), 13)
    tokens = [[(7 * i + 31 * r + 3) % student.vocabulary for i in range(n)] for r, n in enumerate(lengths)]
    try:
        with student.plain_attention():
            alone = [student.hidden_states({"input_ids": torch.tensor([ids], device=device)})[0] for ids in tokens]
        row = torch.tensor([[i for ids in tokens for i in ids]], device=device)
        position_ids = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
        packed = student.hidden_states(
            {"input_ids": row, "attention_mask": torch.ones_like(row), "position_ids": position_ids}
        )[0]
    except Exception as error:  # whatever another library's code raises where a mask is not a tensor
        if fatal_reason(error) is not None:  # the device's fault, not the model's
            raise
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    worst = worst_difference(packed, torch.cat(alone), text)
    if not worst <= _TOLERANCES[student.network.dtype]:
        return f"its hidden states in a packed row differ from those of sequences alone by {worst:.1g}"
    return None
