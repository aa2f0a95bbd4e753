"""`kat-ray eval`: which configuration it makes of its arguments, and the table."""

from dataclasses import replace

import pytest

from kat_ray.cli import main as cli
from kat_ray.cli.arguments import is_override
from kat_ray.cli.evaluate import Asked, configuration, table
from kat_ray.config.load import config_from
from kat_ray.errors import UserError
from kat_ray.rewards.verifiers import EvalResult
from kat_ray.run.reward_functions import has_functions, needs_golds
from kat_ray.run.summary import evaluation_fields


def parts_of(config):
    return {name: (p.data.path, p.k, p.verifier) for name, p in config.evaluation.parts().items()}


def test_a_model_alone_needs_no_configuration():
    asked = Asked(
        "org/model", data=("gsm8k", "math500", "my/set.jsonl"), chat=True, greedy=True,
        overrides=("evaluation.max_tokens=64", "evaluation.sets.set.k=2"),
    )  # fmt: skip
    config, model = configuration(asked)
    assert model == config.student.path == "org/model" and config.used_teachers == {}
    assert parts_of(config) == {
        "": ("openai/gsm8k", 1, "integer"), "greedy": ("openai/gsm8k", 1, "integer"),
        "math500": ("HuggingFaceH4/MATH-500", 4, "math"), "math500/greedy": ("HuggingFaceH4/MATH-500", 1, "math"),
        "set": ("my/set.jsonl", 2, "integer"), "set/greedy": ("my/set.jsonl", 1, "integer"),
    }  # fmt: skip
    assert config.eval_max_tokens == 64 and config.rollout.max_tokens == 1, "a short model takes short answers"
    assert config.data.path == "openai/gsm8k" and has_functions(config) and not needs_golds(config)
    assert all(part.data.chat_template is True for part in config.evaluation.parts().values())


def test_sets_take_the_place_of_a_configurations_own(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "student: {path: a}\nteacher: {path: b}\ndata: {path: c.jsonl, chat_template: true, system_prompt: s}\n"
        "evaluation: {data: {path: h.jsonl}, k: 8, every_k: 4, sets: {old: {preset: aime24}}}\n"
    )
    file = str(tmp_path / "c.yaml")
    config, _ = configuration(Asked("m", config=file, data=("math500", "x.jsonl")))
    assert parts_of(config) == {"": ("HuggingFaceH4/MATH-500", 4, "math"), "x": ("x.jsonl", 4, "math")}
    assert config.evaluation.sets["x"].data.system_prompt == "s", "rendered as in training"
    config, _ = configuration(Asked("m", config=file, greedy=True))
    assert list(parts_of(config)) == ["", "greedy", "old", "old/greedy"]
    config, _ = configuration(Asked("m", config=file, data=("gsm8k",), overrides=("evaluation.k=2",)))
    assert parts_of(config) == {"": ("openai/gsm8k", 2, "integer")}


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("evaluation.k=8", True), ("evaluation.sets.my-set.k=8", True), ("tracking=[wandb]", True),
        ("teacher=null", True), ("evaluation.data.path=/a/b.jsonl", True), ("a=b.jsonl", False),
        ("/data/lr=1/p.jsonl", False), ("./x.y/a=b.jsonl", False), ("gsm8k", False), ("Org/set=1", False),
    ],
)  # fmt: skip
def test_an_override_is_told_from_a_file_with_an_equals_sign(text, is_one):
    assert is_override(text) is is_one


def test_a_file_that_is_not_there_comes_first(tmp_path, capsys):
    """Before the room that its answers have, and with an equals sign in its name."""
    file = tmp_path / "a=b.jsonl"
    assert cli.main(["eval", "demo:student", "--data", str(file), "evaluation.k=2"]) == 2
    assert capsys.readouterr().err == f"error: {file}: no such file of held-out problems\n"
    assert cli.main(["eval", "demo:student", "--data", "demo:heldout", str(file), "evaluation.max_tokens=8"]) == 2
    assert f"{file}: no such file" in capsys.readouterr().err


def test_a_model_without_problems_is_told_which_there_are():
    with pytest.raises(UserError, match="name the problems with --data, such as gsm8k, math500, aime24, aime25"):
        configuration(Asked("org/model"))


def test_the_table_has_a_line_for_each_set():
    tree = {"student": {"path": "a"}, "teacher": {"path": "b"}, "data": {"path": "c"}}
    sets = {"mine": {"data": {"path": "x"}}}
    config = config_from({**tree, "evaluation": {"preset": "gsm8k", "k": 4, "greedy": True, "sets": sets}})
    once = EvalResult(0.75, 0.75, 1, 4, 20.0, 0.0, (1, 0, 1, 1))
    none = EvalResult(0.0, 0.0, 4, 10, 20.0, 1.0, (0,) * 10, 3)
    text = table(config, EvalResult(0.5, 0.75, 4, 4, 31.4, 0.25, (4, 3, 0, 1), 0, {"greedy": once, "mine": none}))
    lines = [line.split("  ") for line in text.splitlines()]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines[:4]] == [
        ["problems", "k", "temperature", "avg@k", "pass@k", "tokens", "cut off", "ran out"],
        ["gsm8k", "4", "4", "1", "50.0% [12.5%, 87.5%]", "75.0% [30.1%, 95.4%]", "31", "25.0%", "0"],
        ["greedy", "4", "1", "0", "75.0% [30.1%, 95.4%]", "75.0% [30.1%, 95.4%]", "20", "0.0%", "0"],
        ["mine", "10", "4", "1", "0.0% [0.0%, 27.8%]", "0.0% [0.0%, 27.8%]", "20", "100.0%", "3"],
    ]
    assert "Wilson" in text


def test_a_summary_holds_every_set_without_its_verdicts():
    more = EvalResult(0.5, 1.0, 2, 1, 3.0, 0.0, (1,))
    plain = EvalResult(0.25, 0.5, 4, 2, 3.0, 0.0, (2, 0))
    assert "sets" not in evaluation_fields(plain) and "right" not in evaluation_fields(plain)
    found = evaluation_fields(replace(plain, sets={"more": more}))
    assert found == evaluation_fields(plain) | {"sets": {"more": evaluation_fields(more)}}
