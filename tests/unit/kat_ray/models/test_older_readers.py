"""Files that transformers 5 wrote, read by 4.57: the names, and the real 4.57.6 on every family."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from kat_ray.models.older_readers import add_older_names, older_tokenizer, with_older_names
from tests.support.exported import make_run
from tests.support.families import BY_NAME, FAMILIES, config_of, make_family
from tests.support.paths import ROOT

VERSION = "4.57.6"
PACKAGES = (f"transformers=={VERSION}", "huggingface_hub>=0.34,<1", "tokenizers==0.22.*")  # that it asks for
IDS = [[int(i) for i in np.random.default_rng(0).integers(3, 100, 24)]]
THETA, NEAR = 54321.0, 999.0  # no family's default; of sliding layers

# Families that 4.57 has under this name and does not read, or computes otherwise from the first token on, which has
# no position: in files that it wrote itself, too.
OTHERWISE = {
    "Phi-3, longrope": "refused: a factor, which its own files do not have",
    "Phi-3, longrope, beyond the original length": "refused: as before",
    "Granite 4 hybrid": "refused: 5 has other words for the kinds of layers",
    "Mamba 2": "refused: an infinite limit of time steps, which 5 writes as an object",
    "Apertus": "its activation",
    "Doge": "its attention",
    "RecurrentGemma": "its recurrent layers",
}


LINEAR = {"rope_type": "linear", "factor": 8.0}
PLAIN = {"rope_theta": 5.0, "rope_scaling": None}


# --- the names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, PLAIN),
        (
            {"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5, **LINEAR}},
            {"rope_theta": 5.0, "partial_rotary_factor": 0.5, "rope_scaling": LINEAR},
        ),
        (
            {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.25}},
            {"rotary_emb_base": 5.0, "rotary_pct": 0.25, "rope_scaling": None},
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_theta": 5.0, **LINEAR},
                    "sliding_attention": {"rope_theta": 6.0, "rope_type": "default"},
                },
            },
            {"rope_theta": 5.0, "rope_local_base_freq": 6.0, "rope_scaling": LINEAR},
        ),
        ({"model_type": "of_tomorrow", "rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, {}),
        ({"model_type": "qwen3_moe", "num_local_experts": 4}, {"num_experts": 4}),
        ({"rope_theta": 5.0, "rope_scaling": None}, {}),  # what 4.57 wrote
        ({"rope_parameters": None}, {}),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 7.0, "rope_scaling": {"a": 1}}, {}),  # is there
        (
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "yarn"}, "rope_theta": 5.0, "rope_scaling": None},
            {"rope_scaling": {"rope_type": "yarn"}},
        ),
    ],
)  # fmt: skip
def test_names_are_added_where_one_is_missing(config, added):
    assert with_older_names(config) == config | added
    assert with_older_names({"text_config": config, "x": 1}) == {"text_config": config | added, "x": 1}


def test_longrope_of_phi3_has_its_three_fields():
    rope = {"rope_type": "longrope", "rope_theta": 5.0, "short_factor": [1.0], "long_factor": [2.0],
            "original_max_position_embeddings": 16}  # fmt: skip
    config = {"model_type": "phi3", "original_max_position_embeddings": 16, "rope_parameters": rope}
    assert with_older_names(config)["rope_scaling"] == {
        "type": "longrope", "short_factor": [1.0], "long_factor": [2.0],
    }  # fmt: skip


def test_a_tokenizers_class_and_special_tokens_get_their_older_names():
    own = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "eos_token": "</s>"}
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    assert older_tokenizer(own) == plain and older_tokenizer(plain) == plain
    qwen = {"tokenizer_class": "Qwen2Tokenizer", "backend": "tokenizers"}
    assert older_tokenizer(qwen | {"extra_special_tokens": ["<tool>"]}) == (
        qwen | {"additional_special_tokens": ["<tool>"]}
    )
    assert older_tokenizer(qwen | {"extra_special_tokens": []}) == qwen
    named = qwen | {"extra_special_tokens": {"image_token": "<img>"}}
    assert older_tokenizer(named) == named


def test_special_tokens_are_the_same_under_their_older_name(tmp_path):
    from transformers import AutoTokenizer

    from tests.support.tokenizers import make_tokenizer

    tokenizer = make_tokenizer(extra=("<tool>",))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["extra_special_tokens"] == ["<tool>"]
    assert add_older_names(tmp_path) is None, "also without a config.json, as beside adapters"
    assert "extra_special_tokens" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.all_special_ids == tokenizer.all_special_ids and len(again.all_special_ids) == 4
    assert again("ab<tool>c")["input_ids"] == tokenizer("ab<tool>c")["input_ids"]


def test_what_means_the_same_is_written_and_what_does_not_is_left_and_said(tmp_path):
    config_of(BY_NAME["Gemma 3, multimodal"]).save_pretrained(tmp_path)
    assert add_older_names(tmp_path) is None
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 1_000_000.0 and text["rope_local_base_freq"] == 10_000.0
    unknown = '{"model_type": "of_tomorrow", "rope_parameters": {"rope_theta": 5.0}}'
    (tmp_path / "config.json").write_text(unknown)
    said = add_older_names(tmp_path)
    assert said.startswith("config.json is without the names by which transformers 4 knows positions")
    assert (tmp_path / "config.json").read_text() == unknown


# --- transformers 4.57 itself --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """Runs code on 4.57.6, which lies in a folder of its own, and returns what it prints as JSON."""
    folder = tmp_path_factory.mktemp("older")
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target"]
    try:
        done = subprocess.run(
            [*command, str(folder), *PACKAGES], capture_output=True, text=True, timeout=600, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"transformers {VERSION} cannot be installed here: pip took more than 10 minutes")
    if done.returncode:
        pytest.skip(f"transformers {VERSION} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")

    def run(code, *arguments):
        head = f"import json, sys, torch, transformers\nassert transformers.__version__ == {VERSION!r}\n"
        path = os.pathsep.join((str(folder), str(ROOT)))
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        found = subprocess.run(
            [sys.executable, "-c", head + code, *map(str, arguments)],
            capture_output=True, text=True, timeout=900, check=False, env=environment,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr[-3000:]
        return json.loads(found.stdout.splitlines()[-1])

    return run


LOGITS = """
from transformers import AutoModelForCausalLM
found = {}
for folder in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            found[folder] = model(torch.tensor(json.loads(sys.argv[1]))).logits.tolist()
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
TOKENS = """
from transformers import AutoTokenizer
found = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps([found("a <b> c")["input_ids"], found.all_special_ids, type(found).__name__]))
"""


def logits_here(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["the student's", "the checkpoint's", "without a student"])
def test_an_exported_model_is_the_same_in_4_57(kind, older, tmp_path, capsys):
    from kat_ray.cli import main as cli

    run = make_run(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": THETA})
    config = tmp_path / "student" / "config.json"
    if kind == "the checkpoint's":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    if kind == "without a student":
        config.parent.rename(tmp_path / "gone")
    assert cli.main(["export", str(run), "--to", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    checkpoint = run / "checkpoints" / "step-20"
    found = older(LOGITS, json.dumps(IDS), tmp_path / "out", checkpoint)
    wanted = logits_here(checkpoint)
    np.testing.assert_allclose(found[str(tmp_path / "out")], wanted, atol=1e-4)
    assert np.abs(np.array(found[str(checkpoint)]) - wanted).max() > 0.1, "it has not got the names"
    ids, special, name = older(TOKENS, tmp_path / "out")
    from transformers import AutoTokenizer

    here = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (ids, special) == (here("a <b> c")["input_ids"], here.all_special_ids)
    assert name == "PreTrainedTokenizerFast"


def _rope_of(family):
    """The family's own positions with another base."""
    config = config_of(family)
    own = getattr(config.get_text_config(), "rope_parameters", None)
    if not own:
        return {}
    if not any(isinstance(value, dict) for value in own.values()):
        return {"rope_parameters": dict(own) | {"rope_theta": THETA}}
    near = THETA if family.config == "Olmo3Config" else NEAR  # which has one for both
    bases = {"full_attention": THETA, "sliding_attention": near}
    return {"rope_parameters": {kind: dict(value) | {"rope_theta": bases[kind]} for kind, value in own.items()}}


@pytest.mark.nightly
def test_families_are_the_same_in_4_57(older, tmp_path):
    """Every family that 4.57 knows, written by 5 with a base of its own."""
    for place, family in enumerate(FAMILIES):
        folder = tmp_path / str(place)
        make_family(family, folder, **_rope_of(family))
        assert add_older_names(folder) is None, family.name
    found = older(LOGITS, json.dumps(IDS), *(tmp_path / str(place) for place in range(len(FAMILIES))))
    same, unknown, other = [], [], {}
    for place, family in enumerate(FAMILIES):
        folder = tmp_path / str(place)
        there = found[str(folder)]
        if isinstance(there, str):
            known = not re.search("does not recognize this architecture", there)
            other |= {family.name: there} if known else {}
            unknown += [] if known else [family.name]
        elif (worst := np.abs(np.array(there) - logits_here(folder)).max()) > 1e-4:
            other[family.name] = worst
        else:
            same.append(family.name)
    assert other.keys() == OTHERWISE.keys(), other
    assert len(same) > 55 and len(unknown) < 20, (same, unknown)
