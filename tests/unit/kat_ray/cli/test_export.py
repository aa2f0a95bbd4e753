"""`kat-ray export`: what is in the folder, what is refused, and a repository of a hub on loopback."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download

from kat_ray.cli import main as cli
from kat_ray.config import ModelConfig
from kat_ray.models.inspect import inspect_model
from kat_ray.models.load import load_causal_lm, plain_logprobs
from tests.support.exported import STEP, files_of, make_run
from tests.support.hub_server import TOKEN, hub_on_loopback
from tests.support.tokenizers import TEMPLATE, make_tokenizer

PROMPT, ANSWER = [5, 9, 40], [7, 8, 30, 31, 1]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def export(capsys, *arguments):
    """Exit code, and what was said."""
    code = cli.main(["export", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out + said.err


def logprobs(path):
    from transformers import AutoModelForCausalLM

    return plain_logprobs(AutoModelForCausalLM.from_pretrained(path), PROMPT, ANSWER, torch.device("cpu"))


def test_the_folder_holds_the_weights_and_the_students_files_as_they_came(run, tmp_path, capsys):
    out, checkpoint = tmp_path / "deep" / "out", run / "checkpoints" / f"step-{STEP}"
    code, said = export(capsys, run, "--to", out)
    assert code == 0 and said == f"{out}: the model of {checkpoint}\n"
    found, student, written = files_of(out), files_of(tmp_path / "student"), files_of(checkpoint)
    assert found.keys() == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "LICENSE",
        *(name for name in student if name.startswith("tokenizer")),
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert found[name] == student[name], "to the byte"
    assert student["tokenizer.json"] != written["tokenizer.json"], "the test would not see it"
    for name in ("model.safetensors", "generation_config.json"):
        assert found[name] == written[name]
    np.testing.assert_array_equal(logprobs(out), logprobs(checkpoint))
    assert np.abs(logprobs(out) - logprobs(tmp_path / "student")).max() > 0.1
    info, tokenizer = inspect_model(ModelConfig(path=str(out)))
    assert info.stop_ids == (1, 2) and tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"], "nothing is left beside it"


def test_config_json_is_the_students_unless_it_means_another_model(run, tmp_path, capsys):
    config = tmp_path / "student" / "config.json"
    own = json.loads(config.read_text())
    own |= {"torch_dtype": own.pop("dtype"), "a_field_of_older_versions": 1}
    config.write_text(json.dumps(own))
    checkpoint = run / "checkpoints" / f"step-{STEP}" / "config.json"
    said = json.loads(checkpoint.read_text())
    checkpoint.write_text(json.dumps(said | {"a_field_of_older_versions": 1, "use_cache": True}))
    assert export(capsys, run, "--to", tmp_path / "a", "--dtype", "bfloat16")[0] == 0
    found = json.loads((tmp_path / "a" / "config.json").read_text())
    older = {"rope_theta": 10000.0, "rope_scaling": None}
    assert found == own | {"torch_dtype": "bfloat16"} | older and "dtype" not in found
    config.write_text(json.dumps(own | {"rope_theta": 12345.0, "rope_parameters": None}))
    code, note = export(capsys, run, "--to", tmp_path / "b")
    assert code == 0 and "config.json is the checkpoint's" in note
    assert json.loads((tmp_path / "b" / "config.json").read_text())["use_cache"] is True


def test_what_transformers_5_wrote_has_the_older_names_too(tmp_path, capsys):
    """Of the student, of the checkpoint where that means another model, and where the student is not to be had."""
    rope = {"rope_type": "llama3", "rope_theta": 54321.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    run = make_run(tmp_path, rope_parameters=rope)
    student = tmp_path / "student"
    make_tokenizer().save_pretrained(student)
    config = student / "tokenizer_config.json"
    own = json.loads(config.read_text()) | {"extra_special_tokens": ["~"]}
    assert own["tokenizer_class"] == "TokenizersBackend" and own["backend"], "what 5 writes"
    config.write_text(json.dumps(own))
    assert export(capsys, run, "--to", tmp_path / "a")[0] == 0
    found = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    del own["backend"], own["extra_special_tokens"]
    assert found == own | {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["~"]}
    assert files_of(tmp_path / "a")["tokenizer.json"] == files_of(student)["tokenizer.json"], "to the byte"
    model = student / "config.json"
    model.write_text(json.dumps(json.loads(model.read_text()) | {"rms_norm_eps": 1e-3}))
    code, said = export(capsys, run, "--to", tmp_path / "b")
    assert code == 0 and "config.json is the checkpoint's" in said
    student.rename(tmp_path / "gone")
    assert export(capsys, run, "--to", tmp_path / "c")[0] == 0
    checkpoint = run / "checkpoints" / f"step-{STEP}"
    for out in (tmp_path / "a", tmp_path / "b", tmp_path / "c"):
        written = json.loads((out / "config.json").read_text())
        assert written["rope_parameters"] == rope and written["rope_theta"] == 54321.0
        assert written["rope_scaling"] == {n: v for n, v in rope.items() if n != "rope_theta"}
        np.testing.assert_array_equal(logprobs(out), logprobs(checkpoint))
        tokenizer = json.loads((out / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert inspect_model(ModelConfig(path=str(out)))[1].decode([5]) == "c"


def test_weights_are_converted_shard_by_shard(tmp_path, capsys):
    run = make_run(tmp_path)
    checkpoint = run / "checkpoints" / f"step-{STEP}"
    whole = load_causal_lm(ModelConfig(path=str(checkpoint)), str(checkpoint), "float32", "student")
    (checkpoint / "model.safetensors").unlink()
    whole.save_pretrained(checkpoint, max_shard_size="200KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    assert export(capsys, run, "--to", tmp_path / "out", "--dtype", "bfloat16")[0] == 0
    info, _ = inspect_model(ModelConfig(path=str(tmp_path / "out")))
    assert info.dtype == "BF16" and info.parameters == sum(p.numel() for p in whole.parameters())
    size = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert size == 2 * info.parameters
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(whole.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b), name


def test_a_card_says_what_it_was_made_of_and_nothing_of_this_machine(run, tmp_path, capsys):
    assert export(capsys, run, "--to", tmp_path / "out")[0] == 0
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "datasets": ["openai/gsm8k"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["kat-ray", "on-policy-distillation"],
    }  # fmt: skip
    assert str(tmp_path) not in text, "no path of the machine"
    for said in (
        "# out", "after 20 optimiser steps of the run `mine`", "| base model | `student` (local) |",
        "| data | `openai/gsm8k`, name main, split train |", "| rule | `kat` (probe_share 0.1, window 64",
        "| before training | 12.5% [", "| after 20 steps | 50.0% [", "| tokens generated | 2,000 |",
        "| KL to the teacher of kept tokens, nats, first and last step | 1, 0.05 |",
        "kat-ray export run --to out", "kat-ray train settings.yaml", "  path: student\n", "  path: held.jsonl\n",
    ):  # fmt: skip
        assert said in text, said
    assert "after 10 steps" not in text and "hours" not in text, "of this checkpoint alone"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"termination": {"rule": "none"}, "objective": {"opd": {"weight": 1.0}}},
        {"termination": {"rule": "kat", "eta": 0.4}, "data": {"path": "d", "chat_template": "student"}},
        {
            "scorer": {"replicas": 2},
            "teachers": {"b": {"path": "c", "scorer": {"replicas": 1}}},
            "data": {"path": "d", "teacher_column": "t"},
        },
    ],
)
def test_the_settings_of_a_card_give_the_configuration_again(changes, tmp_path):
    from kat_ray.config import Config
    from kat_ray.config.load import load_config
    from kat_ray.report.model_card import Exported, model_card

    tree = {"student": {"path": "a"}, "teacher": {"path": "b"}, "data": {"path": "c.jsonl"}} | changes
    config = Config.model_validate(tree)
    text = model_card(Exported("x", False, 5, tmp_path, config, "kat-ray export x"))
    (tmp_path / "settings.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert load_config(tmp_path / "settings.yaml") == config


def test_a_card_lists_every_data_set_of_a_mixture(tmp_path):
    from kat_ray.config import Config
    from kat_ray.report.model_card import Exported, model_card

    mix = {
        "code": {"path": "org/code", "revision": "v1", "weight": 2.0},
        "own": {"path": "/home/me/own.jsonl"},
        "again": {"path": "openai/gsm8k", "name": "socratic"},
    }
    data = {"path": "openai/gsm8k", "name": "main", "weight": 4.0, "mix": mix}
    config = Config.model_validate({"student": {"path": "a/b"}, "teacher": {"path": "c/d"}, "data": data})
    text = model_card(Exported("x", False, 5, tmp_path, config, "kat-ray export x"))
    assert ModelCard(text).data.datasets == ["openai/gsm8k", "org/code"]
    for line in (
        "| data | `openai/gsm8k`, name main, split train, 0.5 of an epoch |",
        "| data code | `org/code` at `v1`, split train, 0.25 of an epoch |",
        "| data own | `own.jsonl` (local), 0.125 of an epoch |",
        "| data again | `openai/gsm8k`, name socratic, split train, 0.125 of an epoch |",
    ):
        assert line in text
    assert "/home/me" not in text


def test_a_card_of_hub_models_names_them(tmp_path):
    from kat_ray.config import Config
    from kat_ray.report.model_card import Exported, model_card

    config = Config.model_validate(
        {"student": {"path": "Qwen/Qwen3-0.6B"}, "teacher": {"path": "Qwen/Qwen3-8B"},
         "data": {"path": "d.jsonl", "chat_template": True, "chat_template_kwargs": {"enable_thinking": False}}}
    )  # fmt: skip
    text = model_card(Exported("me/mine", True, 5, tmp_path, config, "kat-ray export x"))
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "Qwen/Qwen3-0.6B" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and "datasets" not in data
    assert "AutoPeftModelForCausalLM" in text and "## Held-out" not in text and "## Training" not in text
    assert "the base model's own, with {'enable_thinking': False}" in text


def test_the_chat_template_of_training_goes_with_the_model(tmp_path, capsys):
    run = make_run(tmp_path, teacher_template=TEMPLATE, data={"chat_template": "teacher"})
    code, said = export(capsys, run, "--to", tmp_path / "out")
    assert code == 0 and "chat_template.jinja is that of training (data.chat_template = teacher)" in said
    _, tokenizer = inspect_model(ModelConfig(path=str(tmp_path / "out")))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "[user]hi"


def test_what_is_not_there_any_more_is_said(run, tmp_path, capsys):
    (tmp_path / "student").rename(tmp_path / "moved")
    code, said = export(capsys, run, "--to", tmp_path / "a")
    assert code == 0 and "are those that the run wrote" in said and "no such directory" in said
    assert (tmp_path / "a" / "tokenizer.json").exists()
    assert export(capsys, run, "--to", tmp_path / "b", "--base", tmp_path / "moved")[0] == 0
    assert files_of(tmp_path / "b")["tokenizer.json"] == files_of(tmp_path / "moved")["tokenizer.json"]
    alone = (run / "checkpoints" / f"step-{STEP}").rename(tmp_path / "alone")
    code, said = export(capsys, alone, "--to", tmp_path / "c")
    assert code == 0 and "which model this was before training (--base)" in said
    assert "Exported with `kat-ray export alone --to c`" in (tmp_path / "c" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{run}"], "name one place for the model: --to DIR, or --to hub:owner/name"),
        (["{run}", "{tmp}/o", "--to", "{tmp}/o"], "name one place for the model"),
        (["{tmp}/none", "--to", "{tmp}/o"], "none: no such directory; name a run"),
        (["{run}/checkpoints/step-3", "--to", "{tmp}/o"], "step-3: no such directory; there are step-20$"),
        (["{run}", "--to", "{tmp}/student"], "is there already; name a directory that is not, or add --overwrite"),
        (["{run}", "--to", "{tmp}/student/LICENSE"], "is there already, and is no directory of its own"),
        (["{run}", "--to", "{tmp}", "--overwrite"], "is where the checkpoint lies"),
        (["{run}", "--to", "{run}/checkpoints/step-20/x"], "is where the checkpoint lies"),
        (["{run}", "--to", "{tmp}/papers", "--overwrite"], "holds something else than an exported model"),
        (["{run}", "--to", "{tmp}/other-run", "--overwrite"], "holds something else than an exported model"),
        (["{run}", "--to", "{tmp}/o", "--adapter"], "--adapter: .*step-20 holds a whole model, no adapters"),
        (["{run}", "--to", "{tmp}/o", "--private"], "--private: is of a repository"),
        (["{run}", "--to", "hub:mine"], "--to hub:mine: must be hub:owner/name"),
        (["{run}", "--to", "hub:me/mine"], "HF_HUB_OFFLINE is set, and nothing is uploaded"),
        (["{run}", "--to", "s3://bucket/x"], "is the address of an object store"),
        (["{tmp}/papers", "--to", "{tmp}/o"], "holds neither a model .* nor adapters"),
    ],
)
def test_what_is_refused_is_one_message_and_changes_nothing(run, tmp_path, capsys, monkeypatch, arguments, says):
    import re

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    (tmp_path / "other-run" / "training").mkdir(parents=True)
    (tmp_path / "other-run" / "config.json").write_text("{}")
    before = files_of(tmp_path)
    code, said = export(capsys, *(a.format(run=run, tmp=tmp_path) for a in arguments))
    assert code == 2 and re.search(says, said), said
    assert files_of(tmp_path) == before and not (tmp_path / "o").exists()


def test_a_damaged_checkpoint_is_refused_and_a_trimmed_one_is_not(run, tmp_path, capsys):
    from kat_ray.run.checkpoint import FileDigest

    checkpoint = run / "checkpoints" / f"step-{STEP}"
    files = {n: FileDigest.of(checkpoint / n) for n in files_of(checkpoint)}
    listed = {n: {"size": d.size, "sha256": d.sha256} for n, d in files.items()}
    manifest = {"format": 1, "step": STEP, "metric": None, "files": listed}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (checkpoint / "training" / "state.json").unlink()  # what a resume needs is not looked at
    assert export(capsys, run, "--to", tmp_path / "a")[0] == 0
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, said = export(capsys, run, "--to", tmp_path / "b")
    assert code == 2 and "model.safetensors is damaged" in said and not (tmp_path / "b").exists()


def test_overwrite_replaces_a_model_whole(run, tmp_path, capsys):
    out = tmp_path / "student2"
    out.mkdir()
    assert export(capsys, run, "--to", out)[0] == 0, "an empty folder is nobody's"
    (out / "model-of-before.safetensors").write_text("x")
    assert export(capsys, run, "--to", out)[0] == 2
    assert export(capsys, run, "--to", out, "--overwrite")[0] == 0
    assert not (out / "model-of-before.safetensors").exists() and (out / "model.safetensors").exists()


# --- a hub on loopback ---------------------------------------------------------------------------------------


def test_a_repository_of_the_hub_is_the_folder(run, tmp_path, capsys, monkeypatch):
    with hub_on_loopback(monkeypatch) as hub:
        code, said = export(capsys, run, "--to", "hub:me/mine", "--private")
        assert code == 0 and said.startswith(f"{hub.url}/me/mine: the model of"), said
        assert hub.private == {"me/mine": True} and hub.messages["me/mine"] == ["Model after 20 steps of kat-ray"]
        fetched = snapshot_download("me/mine", cache_dir=tmp_path / "cache", token=TOKEN)
        np.testing.assert_array_equal(logprobs(fetched), logprobs(run / "checkpoints" / f"step-{STEP}"))
        code, said = export(capsys, run, "--to", "hub:me/mine")
        assert code == 2 and "the repository holds LICENSE, README.md, config.json, ..." in said
        hub.files["me/mine"]["model-00001-of-00002.safetensors"] = b"of before"
        assert export(capsys, run, "--to", "hub:me/mine", "--overwrite")[0] == 0
    assert export(capsys, run, "--to", tmp_path / "out")[0] == 0
    there = hub.files["me/mine"]
    assert there.pop(".gitattributes")
    local, card = files_of(tmp_path / "out"), there.pop("README.md")
    assert there == {name: content for name, content in local.items() if name != "README.md"}
    assert b"# me/mine" in card and b"kat-ray export run --to hub:me/mine" in card and TOKEN.encode() not in card
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{STEP}"], "nothing is left of it"


def test_what_a_hub_refuses_is_one_message(run, capsys, monkeypatch):
    with hub_on_loopback(monkeypatch) as hub:
        code, said = export(capsys, run, "--to", "hub:you/mine")
        assert code == 2 and "the hub does not take it" in said and "403" in said and TOKEN not in said
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody_at_all")
        code, said = export(capsys, run, "--to", "hub:me/mine")
        assert code == 2 and "the hub does not take it" in said and "hf_of_nobody" not in said
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        code, said = export(capsys, run, "--to", "hub:me/mine")
        assert code == 2 and "there is no token of the hub" in said
    assert hub.files == {}
