"""Models checked from their files: what fits, and what is refused in which words."""

import json
import shutil

import pytest

from kat_ray.config import ModelConfig
from kat_ray.errors import ConfigError, ModelError
from kat_ray.models.inspect import check_models, inspect_model, load_tokenizer, resolve_model
from kat_ray.models.revisions import pinned
from kat_ray.models.tokenizers import compare_tokenizers
from tests.support.configs import ALONE, make_config
from tests.support.models import make_model
from tests.support.tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, changes in (("student", {}), ("teacher", {"num_hidden_layers": 1}), ("narrow", {"vocabulary": 120})):
        make_model(root / name, **changes)
        make_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def pair(originals, tmp_path):
    """Copies of a student and a teacher that a test may break."""
    for name in ("student", "teacher"):
        shutil.copytree(originals / name, tmp_path / name)
    return tmp_path


def edit(file, **changes):
    values = json.loads(file.read_text())
    for key, value in changes.items():
        values.pop(key, None)
        if value is not ...:
            values[key] = value
    file.write_text(json.dumps(values))


def config(root, **sections):
    rollout = {"max_tokens": 64} | sections.pop("rollout", {})
    student = sections.pop("student", {})
    whole = make_config(str(root / "student"), str(root / "teacher"), rollout=rollout, **sections)
    return whole.model_copy(update={"student": whole.student.model_copy(update=student)})


def refusal(root, **sections):
    with pytest.raises(ModelError) as error:
        check_models(config(root, **sections))
    return str(error.value).replace(str(root), "R")


def test_facts_of_a_pair_that_fits(originals):
    facts = check_models(config(originals))
    student = facts.student
    assert (student.vocabulary, student.max_length, student.stop_ids, student.tied) == (200, 256, (1,), True)
    assert student.architecture == "Qwen3ForCausalLM"
    assert student.path == str(originals / "student")
    assert student.dtype == "F32"
    model = make_model(originals / "again")
    assert student.parameters == sum(p.numel() for p in model.parameters())
    assert facts.teachers["teacher"].parameters < student.parameters
    assert (facts.stop_ids, facts.warnings, facts.max_length) == ((1,), (), 256)
    assert facts.max_prompt_tokens(64) == 192
    assert facts.tokenizer("ab")["input_ids"] == [3, 4]


def test_untied_sharded_models_are_counted_whole(tmp_path):
    model = make_model(tmp_path / "m", tied=False)
    for file in (tmp_path / "m").glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    make_tokenizer().save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    info, _ = inspect_model(ModelConfig(path=str(tmp_path / "m")))
    assert (info.parameters, info.tied) == (sum(p.numel() for p in model.parameters()), False)
    shard = min((tmp_path / "m").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ModelError, match=rf"index.json names {shard.name}, which is not there"):
        inspect_model(ModelConfig(path=str(tmp_path / "m")))


def test_stop_ids_of_generation_config_come_first_and_differences_are_told(pair):
    edit(pair / "teacher" / "generation_config.json", eos_token_id=[0, 1])
    facts = check_models(config(pair))
    assert (facts.student.stop_ids, facts.teachers["teacher"].stop_ids, facts.stop_ids) == ((1,), (0, 1), (0, 1))
    (warning,) = facts.warnings
    assert "the student ends on 1 '</s>'; the teacher ends on 0 '<pad>', 1 '</s>'" in warning
    assert "Each of them ends the student's rollouts and answers" in warning and "rollout.eos = merged" in warning
    assert facts.end_ids == (0, 1)
    assert "use merged" in check_models(config(pair, rollout={"eos": "raw"})).warnings[0]


def test_stop_ids_fall_back_to_the_tokenizer_and_must_exist(pair):
    student = pair / "student"
    (student / "generation_config.json").unlink()
    edit(student / "config.json", eos_token_id=...)
    assert check_models(config(pair)).student.stop_ids == (1,)
    edit(student / "tokenizer_config.json", eos_token=...)
    assert "neither generation_config.json, config.json nor the tokenizer names" in refusal(pair)
    edit(student / "config.json", eos_token_id=200)
    assert "eos_token_id 200 is no id of its vocabulary of 200" in refusal(pair)


def damage_weights(directory, size):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d), "student.path: R/student: no such directory"),
        (lambda d: (d / "config.json").unlink(), "student.path: R/student: there is no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "student.path: R/student/config.json: not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "student.path: R/student/config.json: not a JSON object"),
        (lambda d: (d / "model.safetensors").unlink(), "student.path: R/student: there are no weights"),
        (
            lambda d: damage_weights(d, 5000),
            "student.path: R/student/model.safetensors: has 5000 bytes, its header",
        ),
        (lambda d: damage_weights(d, 100), "student.path: R/student/model.safetensors: not a safetensors file"),
        (lambda d: damage_weights(d, 0), "student.path: R/student/model.safetensors: not a safetensors file"),
        (
            lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "student.path: R/student/model.safetensors: not a safetensors file",
        ),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            "student.path: R/student: its weights are a pickle (pytorch_model.bin)",
        ),
        (
            lambda d: edit(d / "config.json", auto_map={"AutoModelForCausalLM": "own.Model"}),
            "student.path: R/student: config.json asks to run Python code",
        ),
        (
            lambda d: edit(d / "config.json", architectures=["BertForMaskedLM"]),
            "student.path: R/student: BertForMaskedLM is not a causal language model",
        ),
        (
            lambda d: edit(d / "config.json", model_type="nothing"),
            "student.path: R/student: transformers cannot read config.json",
        ),
        (
            lambda d: (d / "tokenizer.json").write_text("{}"),
            "student.path: R/student: its tokenizer cannot be loaded",
        ),
        (
            lambda d: edit(d / "config.json", vocab_size=50),
            "student.path: R/student: the tokenizer has id 99 ('\\t'), the model's vocabulary is 50",
        ),
    ],
)
def test_broken_models_are_refused(pair, damage, message):
    damage(pair / "student")
    assert refusal(pair).startswith(message)


def test_missing_tokenizer_is_refused(pair):
    for file in (pair / "student").glob("tokenizer*"):
        file.unlink()
    assert refusal(pair) == "student.path: R/student: there is no tokenizer (tokenizer.json)"


def test_pickles_pass_when_allowed(pair):
    (pair / "student" / "model.safetensors").rename(pair / "student" / "pytorch_model.bin")
    facts = check_models(config(pair, student={"allow_pickle": True}))
    assert facts.student.parameters is None


def test_the_teachers_name_stands_in_its_refusals(pair):
    (pair / "teacher" / "config.json").unlink()
    assert refusal(pair).startswith("teacher.path: R/teacher: there is no config.json")


def test_models_that_do_not_fit_each_other_or_the_configuration(originals, pair):
    shutil.rmtree(pair / "teacher")
    shutil.copytree(originals / "narrow", pair / "teacher")
    assert check_models(config(pair)).teachers["teacher"].vocabulary == 120  # what it lacks is padding
    on_vllm = refusal(pair, scorer={"backend": "vllm", "num_gpus": 1})
    assert on_vllm.startswith("the teacher's vocabulary (120, R/teacher) is smaller than the student's (200")
    wide = {"top_k_logprobs": 201}
    assert refusal(originals, rollout=wide).startswith("rollout.top_k_logprobs = 201: must be <= 200")
    check_models(config(originals, rollout={"top_k_logprobs": 200}))
    assert refusal(originals, rollout={"max_tokens": 256}).startswith("rollout.max_tokens = 256: must be < 256")
    check_models(config(originals, rollout={"max_tokens": 255}))
    held_out = {"data": {"path": "x"}, "max_tokens": 300}
    assert refusal(originals, evaluation=held_out).startswith("evaluation.max_tokens = 300: must be < 256")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swap": True}, "id 3 is 'a' for the student and 'b' for the teacher (100 and 100 entries)"),
        ({"extra": ["<x>"]}, "id 100 is nothing for the student and '<x>' for the teacher (100 and 101 entries)"),
        ({"lowercase": True}, "the tokenizers encode 'Let $x^2"),
    ],
)  # fmt: skip
def test_tokenizers_that_differ(changes, message):
    with pytest.raises(ModelError) as error:
        compare_tokenizers(make_tokenizer(), make_tokenizer(**changes))
    assert message in str(error.value)


def test_added_tokens_that_are_encoded_differently():
    ours, theirs = make_tokenizer(extra=["<x>"]), make_tokenizer(extra=["<x>"])
    compare_tokenizers(ours, theirs)
    ours.add_tokens(["<x>"])  # one token for the student, three characters for the teacher
    with pytest.raises(ModelError, match="encode 'a<x> b' differently"):
        compare_tokenizers(ours, theirs)


def test_another_name_for_the_end_of_text_is_no_difference():
    theirs = make_tokenizer()
    theirs.eos_token = "<pad>"
    compare_tokenizers(make_tokenizer(), theirs)


def test_paths(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model(ModelConfig(path="m")) == str(tmp_path / "m")
    assert resolve_model(ModelConfig(path="org/name")) == "org/name"
    (tmp_path / "model.gguf").write_text("x")
    for path, message in (
        ("model.gguf", "is a file"),
        ("./no", "no such directory"),
        ("a/b/c", "no such directory"),
    ):
        with pytest.raises(ModelError, match=message):
            resolve_model(ModelConfig(path=path))
    with pytest.raises(ConfigError, match="names nothing embedded"):
        resolve_model(ModelConfig(path="demo:x"))


def test_hub_models_come_from_the_cache_when_offline(originals, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="org/tiny: no such directory here, and no such model could be had"):
        load_tokenizer(ModelConfig(path="org/tiny"))
    folder = tmp_path / "models--org--tiny"
    shutil.copytree(originals / "student", folder / "snapshots" / ("a" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    info, tokenizer = inspect_model(ModelConfig(path="org/tiny"))
    assert (info.path, info.vocabulary) == ("org/tiny", 200)
    assert info.parameters is not None
    assert tokenizer("a")["input_ids"] == [3]


def test_where_nobody_asks_a_teacher_none_is_read(pair):
    """Its directory is gone, and its stop ids are nobody's."""
    shutil.rmtree(pair / "teacher")
    alone = {"objective": ALONE["objective"], "rollout": ALONE["rollout"]}
    facts = check_models(config(pair, **alone))
    student, _ = inspect_model(config(pair, **alone).student)
    assert not facts.teachers and facts.models == {"student": student} and facts.stop_ids == student.stop_ids
    assert facts.max_length == student.max_length
    (said,) = facts.warnings
    assert said.startswith(f"teacher.path = '{pair}/teacher' is not read")
    named = config(pair, **alone).model_copy(update={"teacher": None})
    assert check_models(named).warnings == () and pinned(named) == named
    with pytest.raises(ModelError, match="the tokens that the student takes"):
        check_models(config(pair, objective=ALONE["objective"], rollout={**ALONE["rollout"], "max_tokens": 9999}))


def test_a_small_vocabulary_has_no_top_k_to_hold_without_a_teacher(pair):
    rollout = {**ALONE["rollout"], "top_k_logprobs": 5000}
    assert not check_models(config(pair, objective=ALONE["objective"], rollout=rollout)).teachers


def test_several_teachers_are_checked_each_under_its_name(pair, originals):
    """One of another tokenizer, one that ends on other ids, and two names of one checkpoint."""
    shutil.copytree(originals / "student", pair / "second")
    edit(pair / "second" / "generation_config.json", eos_token_id=[1, 2])
    named = {"math": {"path": str(pair / "second")}, "code": {"path": str(pair / "second")}}
    sections = {"data": {"teacher_column": "subject"}}
    facts = check_models(config(pair, teachers=named, **sections))
    assert [*facts.models] == ["student", "teacher", "teachers.math"], "a checkpoint is read once"
    assert facts.stop_ids == (1, 2) and facts.end_ids == (1, 2)
    (warning,) = facts.warnings
    assert "teachers.math ends on 1 '</s>', 2" in warning and "teachers.math's answers end on its own" in warning
    with pytest.raises(ModelError, match="the tokens that all models take"):
        check_models(config(pair, teachers=named, rollout={"max_tokens": 999}, **sections))
    make_tokenizer(swap=True).save_pretrained(pair / "second")
    with pytest.raises(ModelError, match=r"^teachers\.math\.path: the tokenizers "):
        check_models(config(pair, teachers=named, **sections))
    shutil.rmtree(pair / "second")
    with pytest.raises(ModelError, match=r"^teachers\.math\.path: .*no such directory"):
        check_models(config(pair, teachers=named, **sections))
