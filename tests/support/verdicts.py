"""Whether a family's scorer and learner compute what a plain float64 forward pass does: tried, not looked up.

`python -m tests.support.verdicts` tries every family and writes the table of docs/models.md.
"""

import tempfile
from unittest.mock import patch

import numpy as np
import torch

from actors.learner.model import load_student
from actors.learner.packing import collator_for
from actors.learner.tensors import token_rows
from actors.teacher.settings import ScorerSettings
from actors.teacher.transformers_backend import TransformersTeacher
from kat_ray.config import LearnerConfig
from kat_ray.data.batch import TrainingSample
from kat_ray.errors import UserError
from kat_ray.losses.fused_head import head_loss
from kat_ray.losses.term import TermSums
from kat_ray.models.support import ROLES, Role, refusal
from tests.support.chunks import chunk_of
from tests.support.configs import make_config
from tests.support.families import FAMILIES, VOCABULARY, config_of, make_family
from tests.support.paths import ROOT

EXACT = "exact"
TRIED: tuple[Role, ...] = ("learner", "learner-packed", "scorer-transformers")
LONGEST = 64  # prompt and answer together; several windows, and beyond every original length that is to be passed
_TOP_K = 16
# Float32 against float64. Other attention, positions or experts give 1e-1 and more (docs/log.md).
_LOGPROBS, _GRADIENTS = 1e-3, 1e-3


def rollouts():
    """Ragged ones by id: (prompt, answer)."""
    rng = np.random.default_rng(5)
    lengths = {0: (3, 4), 1: (20, LONGEST - 20), 2: (1, 12), 3: (9, 25)}
    return {i: tuple(rng.integers(2, VOCABULARY - 8, n).tolist() for n in ns) for i, ns in lengths.items()}


def plain(path):
    """The model in float64, with attention and experts as its authors wrote them down."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def plain_logprobs(model, prompt, answer):
    """[tokens of the answer, V], of one sequence alone."""
    logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, dim=-1)


def scored_in_pieces(teacher, path):
    """By rollout, the columns of log q at the ids of a chunk, with those ids: short and long rollouts in the same
    passes, piece by piece, one of them taken over with its whole past in between.
    """
    student = plain(path)
    sequences = rollouts()
    got = {i: [] for i in sequences}
    for at, end in ((0, 2), (2, 3), (3, 11), (11, 12), (12, LONGEST)):
        live = {i: s for i, s in sequences.items() if len(s[1]) > at}
        taken_over = {1: [*live[1][0], *live[1][1][:at]]} if at == 3 else {}
        chunk = chunk_of(
            student, live, top_k=_TOP_K, start=dict.fromkeys(live, at),
            end={i: min(end, len(s[1])) for i, s in live.items()}, context=taken_over,
        )  # fmt: skip
        ids = chunk.topk_ids()
        columns = teacher.score(chunk, ids)
        for j, i in enumerate(chunk.rollout_ids.tolist()):
            rows = slice(chunk.offsets[j], chunk.offsets[j + 1])
            got[i].append((columns.topk[rows], torch.from_numpy(ids[rows].astype(np.int64))))
    return {i: tuple(torch.cat(parts) for parts in zip(*pieces, strict=True)) for i, pieces in got.items()}


@torch.no_grad()
def scorer_error(path):
    """Largest |log q - log q of a plain pass| of the transformers backend, with rollouts one by one and together,
    as on a GPU; `UserError` where it refuses.
    """
    config = make_config(str(path), str(path), rollout={"top_k_logprobs": _TOP_K})
    settings, reference, errors = ScorerSettings.from_config(config, str(path), (1,), LONGEST), plain(path), []
    for together in (False, True):
        with patch("actors.teacher.transformers_backend.takes_together", return_value=together):
            scored = scored_in_pieces(TransformersTeacher(settings), path)
        for i, (topk, ids) in scored.items():
            expected = plain_logprobs(reference, *rollouts()[i]).gather(-1, ids)
            errors.append((topk - expected).abs().max())
    return float(torch.stack(errors).max())


def _samples():
    """Of all rollouts, with ids at which log-probabilities are summed in place of a loss."""
    rng = np.random.default_rng(6)
    for i, (prompt, answer) in rollouts().items():
        n = len(answer)
        nothing = np.zeros(n, dtype=np.float32)
        yield TrainingSample(
            i, np.array(prompt), np.array(answer), np.stack([rng.permutation(VOCABULARY)[:_TOP_K] for _ in answer]),
            np.zeros((n, _TOP_K), dtype=np.float32), nothing, nothing, nothing, np.ones(n, dtype=np.float32),
        )  # fmt: skip


class SumOfTopk:
    """A loss term: the sum of the log-probabilities at the rows' ids, which it keeps."""

    stop_ids, sum_names, max_names = (), (), ()

    def __init__(self):
        self.parts = []

    def __call__(self, student, rows):
        self.parts.append(student.topk.detach())
        return TermSums(student.topk.sum(), torch.zeros(0, dtype=torch.float64), torch.zeros(0))


def learner_errors(path, **changes):
    """Largest errors of the learner's log-probabilities, and of its gradients as a share of their norm.

    All rollouts are in one micro-batch, padded to the longest or packed. `UserError` where the learner refuses the
    model.
    """
    config = make_config(str(path), str(path))
    learner = LearnerConfig(dtype="float32", micro_batch_tokens=10**6, **changes)
    student = load_student(config.student, str(path), learner, LONGEST)
    (batch,) = collator_for(student, learner, "student").micro_batches(list(_samples()))
    arguments = {name: torch.from_numpy(a) for name, a in batch.inputs.arguments().items()}
    rows, columns = torch.from_numpy(batch.inputs.positions).unbind(1)
    term, given = SumOfTopk(), token_rows(batch, torch.device("cpu"))
    hidden = student.hidden_states(arguments)[rows, columns]
    head_loss(hidden, student.output_layer, given, term, chunk_tokens=16).loss.backward()
    logprobs, ids = torch.cat(term.parts), given.topk_ids

    reference = plain(path)
    expected = torch.cat([plain_logprobs(reference, s.prompt_ids, s.token_ids) for s in batch.samples])
    expected.gather(-1, ids).sum().backward()
    theirs = dict(reference.named_parameters())
    differences = {
        name: float((own.grad - theirs[name].grad).norm())
        for name, own in student.trained_parameters()
        if own.grad is not None or theirs[name].grad is not None
    }
    norm = max(float(p.grad.norm()) for p in theirs.values() if p.grad is not None)
    return float((logprobs - expected.gather(-1, ids)).detach().abs().max()), max(differences.values()) / norm


def published(path):
    """What the learner publishes, by name."""
    config = make_config(str(path), str(path))
    update = load_student(config.student, str(path), LearnerConfig(dtype="float32"), LONGEST).weight_update(
        1, torch.float32
    )
    return dict(zip(update.names, update.arrays, strict=True))


def on_disk(path):
    """The tensors of a checkpoint, by name."""
    from safetensors.numpy import load_file

    return {name: array for file in sorted(path.glob("*.safetensors")) for name, array in load_file(file).items()}


def _verdict(measure, bounds):
    """A cell of the table; never an exception of another library."""
    try:
        errors = measure()
    except UserError:
        return "refused when loaded"
    within = all(error < bound for error, bound in zip(errors, bounds, strict=True))
    return EXACT if within else "wrong by " + ", ".join(f"{error:.2g}" for error in errors)


def decided(family, role):
    """What `kat_ray/models/support.py` says of a family and a role: None, or a cell."""
    found = refusal(config_of(family), role, LONGEST)
    return found and f"refused: {found.kind}"


def tried_cells(family, path):
    """Learner's and scorer's cells of a family whose model is at `path`, by trying whatever support may say."""
    tries = {
        "learner": lambda: _verdict(lambda: learner_errors(path), (_LOGPROBS, _GRADIENTS)),
        "learner-packed": lambda: _verdict(
            lambda: learner_errors(path, batching="packed"), (_LOGPROBS, _GRADIENTS)
        ),
        "scorer-transformers": lambda: _verdict(lambda: (scorer_error(path),), (_LOGPROBS,)),
    }
    found = {role: attempt() for role, attempt in tries.items()}
    # Who refuses by the configuration says why.
    return {role: decided(family, role) or cell if "refused" in cell else cell for role, cell in found.items()}


def other_cells(family):
    """The cells of roles that are not tried with every family."""
    return {role: decided(family, role) or "taken" for role in ROLES if role not in TRIED}


# --- docs/models.md ----------------------------------------------------------------------------------------

PAGE = ROOT / "docs/models.md"
_BEGIN, _END = "<!-- written by tests/support/verdicts.py -->\n", "<!-- end -->\n"
_COLUMNS: dict[Role, str] = {
    "sampler-cpu": "sampler, CPU",
    "sampler-gpu": "sampler, GPU",
    "learner": "learner",
    "learner-packed": "learner, packed",
    "scorer-transformers": "scorer, transformers",
    "scorer-vllm": "scorer, vLLM on a GPU",
}


def rows_of_page():
    """The cells of the page's table by family and role."""
    table = PAGE.read_text(encoding="utf-8").split(_BEGIN)[1].split(_END)[0].splitlines()[2:]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {name: dict(zip(_COLUMNS, cells, strict=True)) for name, *cells in split}


def write_page():
    """Try every family and write the table; everything else on the page stays."""
    lines = [f"| family | {' | '.join(_COLUMNS.values())} |", "| --- " * (1 + len(_COLUMNS)) + "|"]
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            make_family(family, folder)
            cells = tried_cells(family, folder) | other_cells(family)
        lines.append(f"| {family.name} | {' | '.join(cells[role] for role in _COLUMNS)} |")
        print(lines[-1], flush=True)
    before, rest = PAGE.read_text(encoding="utf-8").split(_BEGIN)
    table = "\n".join(lines) + "\n"
    PAGE.write_text(before + _BEGIN + table + _END + rest.split(_END)[1], encoding="utf-8")


if __name__ == "__main__":
    write_page()
