"""The learner's state with the real DeepSpeed: what is saved is all there is, and comes back bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from kat_ray.run.checkpoint import CheckpointError, Checkpoints, FileDigest
from tests.cluster.ranks import Group
from tests.support.models import make_model
from tests.support.tokenizers import make_tokenizer


@pytest.fixture
def group(models):
    """Makes groups of learner ranks, and ends them."""
    made = []

    def make(world_size, pair=models, **learner):
        made.append(Group(pair, world_size, **learner))
        return made[-1]

    yield make
    for one in made:
        one.close()


def saved_tensors(path):
    """Parts of all ranks put together, by kind and parameter: flat arrays."""
    tensors = {}
    for file in (path / "training").glob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            for name, part in json.loads(opened.metadata()["learner"])["parameters"].items():
                for kind in ("master", "exp_avg", "exp_avg_sq"):
                    whole = tensors.setdefault(
                        f"{kind}/{name}", np.full(np.prod(part["shape"]), np.nan, np.float32)
                    )
                    whole[part["start"] : part["start"] + part["size"]] = opened.get_tensor(f"{kind}/{name}")
    return tensors


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype and (value == right[name]).all(), name


# Each stage with each type and with each number of ranks; not each with each of both.
CASES = [
    (1, 1, "float32"),
    pytest.param(2, 2, "bfloat16", marks=pytest.mark.integration),
    pytest.param(2, 3, "float32", marks=pytest.mark.integration),
    *(
        pytest.param(w, s, d, marks=pytest.mark.nightly)
        for w, s, d in [
            (1, 0, "bfloat16"), (1, 2, "float32"), (1, 3, "bfloat16"), (2, 0, "float32"), (2, 1, "bfloat16"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("world_size", "stage", "dtype"), CASES)
def test_a_resumed_learner_takes_the_steps_of_one_that_was_not_stopped(
    group, models, tmp_path, tokenizer_dir, world_size, stage, dtype
):
    path = tmp_path / "step-3"
    annealed = {"opd": {"weight": 1.0, "final_weight": 0.2, "anneal_steps": 5}}
    learner = {"zero_stage": stage, "dtype": dtype, "objective": annealed if dtype == "bfloat16" else None}
    first = group(world_size, **learner)
    first.steps(models, range(3))
    digests = first.save(path, tokenizer_dir)
    at_snapshot = first.weights()
    straight = first.steps(models, range(3, 6))
    expected = first.weights()
    assert any((expected[n] != at_snapshot[n]).any() for n in expected)
    first.close()

    resumed = group(world_size, **learner)
    resumed.restore(path)
    assert_same(resumed.weights(), at_snapshot)
    assert resumed.steps(models, range(3, 6)) == straight
    assert_same(resumed.weights(), expected)
    files = {p.relative_to(path).as_posix(): FileDigest.of(p) for p in path.rglob("*") if p.is_file()}
    assert digests == files


@pytest.mark.integration
@pytest.mark.parametrize(
    ("written_by", "read_by"),
    [
        ((1, 0), (2, 3)),
        ((2, 2), (1, 0)),
        pytest.param((1, 1), (2, 2), marks=pytest.mark.nightly),
        pytest.param((2, 1), (1, 3), marks=pytest.mark.nightly),
        pytest.param((2, 0), (2, 1), marks=pytest.mark.nightly),
    ],
)
def test_another_number_of_ranks_or_stage_finds_the_same_state(
    group, models, tmp_path, tokenizer_dir, written_by, read_by
):
    first = group(written_by[0], zero_stage=written_by[1])
    first.steps(models, range(2))
    first.save(tmp_path / "step-2", tokenizer_dir)
    saved = saved_tensors(tmp_path / "step-2")
    assert not any(np.isnan(v).any() for v in saved.values()), "every element is in some file"
    weights = first.weights()
    expected = first.steps(models, [2])
    first.close()

    second = group(read_by[0], zero_stage=read_by[1])
    second.restore(tmp_path / "step-2")
    assert_same(second.weights(), weights)
    second.save(tmp_path / "again", tokenizer_dir)
    assert_same(saved_tensors(tmp_path / "again"), saved)
    (report,) = second.steps(models, [2])
    assert report["lr"] == expected[0]["lr"]
    assert report["loss"] == pytest.approx(expected[0]["loss"], rel=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("world_size", "stage", "dtype"),
    [
        (2, 3, "bfloat16"),
        *(
            pytest.param(w, s, d, marks=pytest.mark.nightly)
            for w, s, d in [(2, 1, "float32"), (2, 2, "bfloat16"), (1, 3, "float32")]
        ),
    ],
)
def test_what_is_saved_is_what_deepspeed_gathers(group, models, tmp_path, tokenizer_dir, world_size, stage, dtype):
    first = group(world_size, zero_stage=stage, dtype=dtype)
    first.steps(models, range(2))
    first.save(tmp_path / "step-2", tokenizer_dir)
    expected = first.all("full_state")[0]
    assert_same(saved_tensors(tmp_path / "step-2"), expected)
    sizes = [p.stat().st_size for p in (tmp_path / "step-2" / "training").iterdir()]
    assert len(sizes) == world_size and max(sizes) < 1.1 * min(sizes), "each rank writes its share"


def test_steps_while_it_is_written_do_not_change_what_is_written(group, models, tmp_path, tokenizer_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    one = group(1, lr=1e-2)
    one.steps(models, range(2))
    before = one.save(tmp_path / "step-2", tokenizer_dir)
    one.all("hold")
    one.snapshot(tmp_path / "step-2-again", tokenizer_dir)
    one.steps(models, range(2, 5))
    assert not any((tmp_path / "step-2-again").iterdir())
    one.all("release")
    assert one.written() == before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step-2")
    assert loaded.config.use_cache
    assert len(AutoTokenizer.from_pretrained(tmp_path / "step-2")) == len(make_tokenizer())
    assert one.save(tmp_path / "step-5", tokenizer_dir) != before


@pytest.mark.integration
def test_before_the_first_step_there_are_no_moments_to_save(group, models, tmp_path, tokenizer_dir):
    one = group(1)
    one.save(tmp_path / "step-0", tokenizer_dir)
    expected = one.steps(models, [0])
    one.close()
    other = group(1)
    other.restore(tmp_path / "step-0")
    assert other.steps(models, [0]) == expected


@pytest.mark.integration
def test_a_checkpoint_of_another_student_is_refused(group, models, tmp_path, tokenizer_dir):
    one = group(1)
    one.steps(models, [0])
    one.save(tmp_path / "step-1", tokenizer_dir)
    weights, random = one.weights(), one.all("random")
    make_model(tmp_path / "wide", intermediate_size=80, num_hidden_layers=3)
    other = group(1, models | {"student": (str(tmp_path / "wide"), None)})
    with pytest.raises(CheckpointError, match=r"layers\.2\..* is missing.*more\); resume with the student\.path"):
        other.restore(tmp_path / "step-1")
    make_model(tmp_path / "flat", intermediate_size=80)
    other = group(1, models | {"student": (str(tmp_path / "flat"), None)})
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight has shape \[96, 64\] instead of \[80, 64\]"):
        other.restore(tmp_path / "step-1")

    same = group(1)
    same.restore(tmp_path / "step-1")
    assert_same(same.weights(), weights)
    assert same.all("random") == random
    (file,) = (tmp_path / "step-1" / "training").iterdir()
    file.rename(file.with_name("learner-0-of-2.safetensors"))
    content = file.with_name("learner-0-of-2.safetensors").read_bytes()
    file.with_name("learner-0-of-2.safetensors").write_bytes(
        content.replace(b'world_size\\": 1', b'world_size\\": 2')
    )
    with pytest.raises(CheckpointError, match="does not hold the files of one learner"):
        same.restore(tmp_path / "step-1")
    file.with_name("learner-0-of-2.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        same.restore(tmp_path / "step-1")


def test_an_error_of_the_writing_thread_comes_out_once(group, models, tmp_path, tokenizer_dir):
    one = group(1)
    one.all("snapshot", str(tmp_path / "nowhere" / "step-1"), tokenizer_dir)
    with pytest.raises(OSError, match="nowhere"):
        one.written()
    one.save(tmp_path / "step-1", tokenizer_dir)


@pytest.mark.integration
def test_a_learner_goes_on_from_a_committed_checkpoint(group, models, tmp_path, tokenizer_dir):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, keep_best=True)
    one = group(2, zero_stage=2)
    for step in range(1, 4):
        one.steps(models, [step])
        path = checkpoints.begin(step)
        one.all("snapshot", str(path), tokenizer_dir)
        checkpoints.commit(step, {"step": step}, one.written(), metric=None)
    weights = one.weights()
    newest, notes = checkpoints.newest()
    assert (newest.step, notes) == (3, [])
    (file,) = Path(newest.path).glob("training/learner-1-of-2.safetensors")
    other = group(2, zero_stage=2)
    other.restore(newest.path)
    assert_same(other.weights(), weights)
    file.write_bytes(file.read_bytes()[:-1])
    assert checkpoints.newest()[0].step == 2
