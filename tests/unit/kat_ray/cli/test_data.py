"""`kat-ray data`: what it shows of prompts, and what it says of those that are refused."""

import json

import pytest
from rich.console import Console

from kat_ray.cli import main as cli
from kat_ray.cli.data import coloured
from tests.support.models import make_model
from tests.support.tokenizers import TEMPLATE, make_tokenizer

END = "<|end|>"


@pytest.fixture
def model(tmp_path):
    tokenizer = make_tokenizer(chat_template=TEMPLATE.replace("{% endfor %}", f"{END}{{% endfor %}}"))
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})
    make_model(tmp_path / "model", vocabulary=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def shown(tmp_path, capsys):
    def show(rows, *arguments):
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = cli.main(["data", str(path), *arguments])
        said = capsys.readouterr()
        return code, said.out.replace(str(path), "F") + said.err

    return show


def test_prompts_are_shown_as_the_model_sees_them(shown, model):
    rows = [{"prompt": f"hi{n}", "answer": n} for n in range(5)]
    code, said = shown(rows, "--model", model, "--prompts", "2", "data.chat_template=true", "rollout.max_tokens=64")
    assert code == 0, said
    assert "F: 5 rows, 5 of them usable" in said
    one = "·".join([*"[user]hi0", END, *"[assistant]"])
    assert f"p:1: {9 + 1 + 11} tokens, answer '0'\n{one}\n" in said and "p:2:" in said and "p:3:" not in said
    assert "gold answers: 5 of 5 prompts, 5 that `integer` can match" in said
    assert "shortest 21, median 21" in said


def test_rows_that_are_refused_are_counted_by_reason(shown, model):
    rows = [{"prompt": "a", "answer": 1}, {"prompt": ""}, {"x": 1}, {"prompt": 3}, {"prompt": " "}, {"prompt": "b"}]
    code, said = shown(rows, "--model", model)
    assert code == 1 and "F: 6 rows, 2 of them usable" in said
    assert "refused: 2 x prompt is empty; the first: F:2" in said
    assert (
        "refused: 1 x there is no column 'prompt'; there are x (data.prompt_column chooses); the first: F:3" in said
    )
    assert "refused: 1 x prompt is a number; a prompt is text or a list of messages; the first: F:4" in said


def test_a_tokenizer_is_enough(shown, model, tmp_path):
    (tmp_path / "model" / "model.safetensors").unlink()
    code, said = shown([{"prompt": "a"}, {"prompt": "b" * 300}], "--model", model, "rollout.max_tokens=64")
    assert code == 0 and "1 prompts of more than 192 tokens" in said
    (tmp_path / "model" / "config.json").unlink()
    assert shown([{"prompt": "a"}, {"prompt": "b" * 300}], "--model", model)[0] == 0


def test_what_is_left_out_is_said(shown, model):
    rows = [{"prompt": p, "answer": a} for p, a in (("a", "1"), ("a", "2"), ("b" * 300, "3"), ("c", "x"))]
    code, said = shown(rows, "--model", model, "data.dedupe=true", "rollout.max_tokens=64")
    assert code == 0
    assert "left out: 1 prompts that repeat another, 1 of them with another answer (data.dedupe)" in said
    assert "left out: 1 prompts of more than 192 tokens (data.too_long = skip)" in said
    assert "gold answers: 2 of 2 prompts, 1 that `integer` can match" in said
    assert "not matched, first of 1: p:4: the gold answer 'x' is not an integer" in said


def test_shares_of_a_mixture_and_what_a_teacher_is_told(shown, model, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"prompt": "z"}\n')
    mix = f"data.mix={{b: {{path: {tmp_path / 'b.jsonl'}, weight: 3}}}}"
    code, said = shown([{"prompt": "a"}, {"prompt": "b"}], "--model", model, mix, "rollout.max_tokens=64")
    assert code == 0 and "an epoch has 8 prompts: data 25% (2 prompts), b 75% (1 prompts)" in said
    assert "no prompt has a gold answer" in said
    told = "teacher.context=x{prompt}{hint}"
    code, said = shown([{"prompt": "a", "hint": "h"}], "--model", model, told, "rollout.max_tokens=64")
    assert code == 0 and "the teacher is told (3 tokens)\nx·a·h\n" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo:train"], "is a data set; name the model that is to see it with --model"),
        (["demo:train", "--model", "/none"], "/none: no such directory"),
        (["/none.jsonl", "--model", "demo:student"], "/none.jsonl: cannot be read"),
        (["demo", "evaluation.data=null", "--heldout"], "--heldout: evaluation.data = null"),
        (["demo", "data.colour=red"], "data.colour: unknown field"),
        ([], "name a data set, a YAML file, `demo`, or a run"),
        (["demo", "--heldout", "maths"], "--heldout maths: names no set of evaluation.sets (there are none)"),
        (["demo", "rollout.max_tokens=256"], "rollout.max_tokens = 256: must be < 256, the tokens that demo"),
        (["demo", "--heldout", "evaluation.max_tokens=300"], "evaluation.max_tokens = 300: must be < 256"),
    ],
)
def test_what_cannot_be_shown_is_one_message(arguments, says, capsys):
    assert cli.main(["data", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_held_out_problems_of_a_configuration(capsys):
    assert cli.main(["data", "demo", "--heldout", "--prompts", "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("demo:heldout: 200 rows, 200 of them usable") and "heldout:0" in said


def test_a_data_set_alone_has_all_the_room_of_the_model(shown):
    """No answer is sampled, and 1,024 tokens of one, the default, are more than this model takes."""
    code, said = shown([{"prompt": "start 1 add 2\n"}, {"prompt": "1 " * 300}], "--model", "demo:student")
    assert code == 0 and "left out: 1 prompts of more than 255 tokens" in said, said


def test_further_held_out_sets_are_shown_by_name(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"prompt": "start 1 add 2\\n", "answer": "$3$"}\n')
    mine = {"data": {"path": str(tmp_path / "x.jsonl")}, "max_tokens": 100, "verifier": "math"}
    sets = f"evaluation.sets={json.dumps({'mine': mine})}"
    for arguments in (["demo", sets, "--heldout"], ["--heldout", "demo", sets]):
        assert cli.main(["data", *arguments]) == 0
        said = capsys.readouterr().out
        assert said.startswith("demo:heldout: 200 rows") and "(--heldout NAME): mine\n" in said
    assert cli.main(["data", "demo", sets, "--heldout", "mine"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'x.jsonl'}: 1 rows") and "that `math` can match" in said
    assert cli.main(["data", "demo", sets, "--heldout", "mine", "evaluation.sets.mine.max_tokens=256"]) == 2
    assert "evaluation.sets.mine.max_tokens = 256: must be < 256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "boundary"),
    [({}, False), ({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, True)],
)
def test_boundaries_are_dots_where_a_terminal_has_no_colours(environment, boundary):
    import io

    from kat_ray.cli.data import _show_prompt
    from kat_ray.types.records import Prompt

    there = {"TERM": "xterm-256color", **environment}
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, _environ=there)
    tokenizer = make_tokenizer()
    _show_prompt(Prompt("p", tuple(tokenizer("ab")["input_ids"]), None), tokenizer, console)
    assert ("a·b" in out.getvalue()) is boundary


def test_neighbouring_tokens_have_other_colours_and_special_ones_their_own():
    tokenizer = make_tokenizer()
    ids = (*tokenizer("a b\n")["input_ids"], 1)
    text = coloured(ids, tokenizer, plain=False)
    assert text.plain == "a b↵\n</s>"
    styles = [str(span.style) for span in text.spans]
    assert len({*styles[:2]}) == 2 and styles[0] == styles[2] and styles[1] == styles[3]
    assert styles[4] not in styles[:4]
    console = Console(force_terminal=True, color_system="truecolor", width=80)
    with console.capture() as captured:
        console.print(text)
    assert "\x1b[" in captured.get()
    assert coloured(ids, tokenizer, plain=True).plain == "a· ·b·↵\n·</s>"
    assert "and 500 tokens more" in coloured((5,) * 2000, tokenizer, plain=True).plain
