"""Completions of the data: read, drawn by seed and step, and made samples of the learner's."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from kat_ray.config import Config, DataConfig
from kat_ray.config.off_policy import most_given
from kat_ray.data.completions import CompletionLimits
from kat_ray.data.given import GivenCompletion, GivenShare, given_chunk, given_samples
from kat_ray.data.prompt_order import PromptOrder, given_completions, given_places, rollout_specs
from kat_ray.data.prompts import load_prompts
from kat_ray.errors import DataError
from kat_ray.types.records import Prompt, TeacherRows
from kat_ray.types.token_ids import pack_ids

END = 9


class Letters:
    """A tokenizer of characters, by their codes; the end of a text is `END`."""

    eos_token_id = END
    chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}\n<assistant>{% else %}\t\n{% endif %}"
    )

    def __call__(self, texts, add_special_tokens=False):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def get_chat_template(self):
        return self.chat_template

    def apply_chat_template(self, messages, chat_template, tokenize, **arguments):
        import jinja2

        return jinja2.Template(chat_template, keep_trailing_newline=True).render(messages=messages, **arguments)


def load(tmp_path, rows, max_tokens=50, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    given = DataConfig.model_validate({"path": str(path), "completion_column": "solution", **data})
    limits = CompletionLimits((END, 8), max_tokens)
    return load_prompts(given, Letters(), None, completions=limits).prompts


def text_of(prompt):
    return "".join(map(chr, prompt.completion_ids))


def test_a_completion_is_the_column_and_ends_as_a_rollout_does(tmp_path):
    rows = [{"prompt": "a", "solution": s} for s in ("xyz", "xy\tz", "x\x08y\t", "x" * 60)]
    first, second, third, long = load(tmp_path, rows)
    assert text_of(first) == "xyz\t", "its end is put behind it"
    assert text_of(second) == "xy\t" and text_of(third) == "x\x08", "no rollout goes on after one"
    assert text_of(long) == "x" * 50, "as a rollout that ran to its limit"


def test_a_chat_template_goes_on_from_the_prompt(tmp_path):
    rows = [
        {"prompt": "a", "solution": "b"},
        {"prompt": [{"role": "user", "content": "a"}], "solution": [{"role": "assistant", "content": "b"}]},
    ]
    for prompt in load(tmp_path, rows, chat_template=True):
        assert "".join(map(chr, prompt.token_ids)) == "<user>a\n<assistant>" and text_of(prompt) == "b\t"


def test_a_template_that_renders_answers_in_another_way_is_refused(tmp_path):
    template = tmp_path / "other.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template does not go on from the prompt"):
        load(tmp_path, [{"prompt": "a", "solution": "b"}], chat_template=str(template))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({}, r"there is no column 'solution'; .*\(data\.completion_column chooses\)"),
        ({"solution": None}, "solution is null"),
        ({"solution": math.nan}, r"solution is missing \(NaN\)"),
        ({"solution": " "}, "solution is empty"),
        ({"solution": 3}, "solution is a number; a completion is text"),
        ({"solution": [{"role": "user", "content": "x"}]}, "solution is a list; a completion is text"),
    ],
)
def test_what_is_no_completion_is_named(tmp_path, row, told):
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {told}"):
        load(tmp_path, [{"prompt": "a", "solution": "b"}, {"prompt": "c"} | row])


def test_several_completions_of_one_prompt_are_none_that_repeat(tmp_path):
    rows = [{"prompt": "a", "solution": s} for s in ("b", "c", "b")]
    assert [text_of(p) for p in load(tmp_path, rows, dedupe=True)] == ["b\t", "c\t"]
    assert len(load(tmp_path, rows, dedupe=True, completion_column=None)) == 1


def test_other_completions_are_other_prompts(tmp_path):
    def digest(solution, column="solution"):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"prompt": "a", "solution": solution}) + "\n")
        data = DataConfig.model_validate({"path": str(path), "completion_column": column})
        return load_prompts(data, Letters(), None, completions=CompletionLimits((END,), 50)).digest

    assert digest("b") == digest("b") != digest("c")
    assert digest("b", None) == digest("c", None), "what is not read does not matter"


def config(share=0.4, seed=0, prompts=6, **off_policy):
    return Config.model_validate(
        {
            "run": {"seed": seed}, "student": {"path": "a"}, "teacher": {"path": "b"},
            "data": {"path": "x.jsonl", "completion_column": "solution" if share else None},
            "rollout": {"prompts_per_step": prompts, "rollouts_per_prompt": 3},
            "objective": {"off_policy": {"share": share, **off_policy}},
        }
    )  # fmt: skip


def order(count=20):
    prompts = [Prompt(f"p{i}", (1, 2), completion_ids=(3, 4, END)) for i in range(count)]
    return PromptOrder(prompts, seed=0, shuffle=True)


def test_a_prompt_has_rollouts_or_its_completion_and_ids_are_those_of_a_run_without(tmp_path):
    for step in range(12):
        places, left_out = range(6 * step, 6 * step + 6), given_places(config(), step)
        specs = rollout_specs(order(), config(), places, given=left_out)
        given = given_completions(order(), config(), step)
        plain = rollout_specs(order(), config(0.0), places)
        taken = {c.rollout_id for c in given}
        assert 2 <= len(given) <= 3 and len(specs) == 18 - 3 * len(given)
        assert [s for s in plain if s.rollout_id in {x.rollout_id for x in specs}] == specs
        assert taken | {i + n for i in taken for n in (1, 2)} | {s.rollout_id for s in specs} == set(
            range(18 * step, 18 * step + 18)
        )
        assert {c.prompt.prompt_id for c in given}.isdisjoint({s.prompt_id for s in specs})


def test_the_draw_is_one_of_seed_and_step_with_the_share_as_its_mean():
    counts = [len(given_places(config(), step)) for step in range(2000)]
    assert np.mean(counts) == pytest.approx(2.4, abs=0.05) and set(counts) == {2, 3}
    places = Counter(place for step in range(2000) for place in given_places(config(), step))
    assert min(places.values()) > 600, "any prompt of a step may be drawn"
    draws = {seed: [given_places(config(seed=seed), s) for s in range(50)] for seed in (0, 1)}
    assert draws[0] == [given_places(config(), s) for s in range(50)] != draws[1]
    assert [len(given_places(config(0.5, steps=2), s)) for s in range(4)] == [3, 3, 0, 0]
    assert {len(given_places(config(0.5), s)) for s in range(300)} == {3}


@pytest.mark.parametrize(("share", "prompts"), [(0.5, 2), (0.9, 10), (0.84, 6 * 3)])
def test_a_prompt_is_always_left_to_the_student(share, prompts):
    most = max(len(given_places(config(share, prompts=prompts), step)) for step in range(300))
    assert most <= most_given(share, prompts) < prompts


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"objective": {"off_policy": {"share": 0.5}}}, r"share = 0\.5: needs data\.completion_column"),
        ({"data": {"path": "x.jsonl", "completion_column": "s"}}, r"'s': needs objective\.off_policy\.share > 0"),
        (
            {"objective": {"off_policy": {"share": 0.9}}, "data": {"path": "x.jsonl", "completion_column": "s"}},
            r"share = 0\.9: must leave a prompt .* <= 0\.75 with rollout\.prompts_per_step = 4; .* to 10 or more",
        ),
        (
            {
                "objective": {"off_policy": {"share": 0.5}}, "data": {"path": "x.jsonl", "completion_column": "s"},
                "rollout": {"prompts_per_step": 1},
            },
            r"share = 0\.5: must leave a prompt of each step to the student, and rollout\.prompts_per_step = 1; "
            r"raise rollout\.prompts_per_step to 2 or more",
        ),
        (
            {
                "objective": {"opd": {"weight": 0}, "rl": {"weight": 1}, "off_policy": {"share": 0.5}},
                "termination": {"rule": "none"}, "rollout": {"rollouts_per_prompt": 2, "top_p": 1},
                "data": {"path": "x.jsonl", "completion_column": "s"},
            },
            r"loss = 'distillation': no teacher is asked .* use 'sft'",
        ),
        ({"evaluation": {"data": {"path": "y.jsonl", "completion_column": "s"}}}, "held-out problems"),
    ],
)  # fmt: skip
def test_mistakes_are_one_message(tree, told):
    base = {"student": {"path": "a"}, "teacher": {"path": "b"}, "data": {"path": "x.jsonl"}}
    rollout = {"prompts_per_step": 4} | tree.get("rollout", {})
    with pytest.raises(ValueError, match=told):
        Config.model_validate(base | tree | {"rollout": rollout})


def completions():
    told = Prompt("p1", (1, 2), context_ids=(7, 7, 7), completion_ids=(70_000, END))
    return [GivenCompletion(12, Prompt("p0", (1, 2), completion_ids=(3, 4, END))), GivenCompletion(15, told)]


def test_a_chunk_has_whole_completions_behind_what_their_teacher_is_told():
    chunk = given_chunk(completions())
    assert chunk.rollout_ids.tolist() == [12, 15] and chunk.new_tokens(1).tolist() == [70_000, END]
    assert chunk.context(0).tolist() == [1, 2] and chunk.context(1).tolist() == [7, 7, 7]
    assert chunk.whole_past.all() and chunk.topk_ids()[:, 0].tolist() == chunk.token_ids.tolist()
    assert given_chunk([]).tokens == 0


@pytest.mark.parametrize("scored", [True, False])
def test_samples_have_the_students_prompt_and_the_teachers_ids(scored):
    chunk, kept = given_chunk(completions()), [c.kept for c in completions()]
    ids = np.arange(15, dtype=np.int32).reshape(5, 3) * 9000
    rows = TeacherRows(
        np.full((5, 3), -2, np.float16), np.full(5, -1, np.float32), np.full(5, -np.inf, np.float32),
        *pack_ids(ids, 200_000),
    )  # fmt: skip
    share = GivenShare([chunk], [rows], kept, 0.2)
    first, second = given_samples(share, [chunk], [rows] if scored else [], 3)
    assert first.prompt_ids.tolist() == [1, 2] == second.prompt_ids.tolist()
    assert first.token_ids.tolist() == [3, 4, END] and second.input_length == 3
    assert first.given.tolist() == pytest.approx([0.2] * 3) and first.policy is None
    assert first.topk_ids.shape == (3, 3) and first.teacher_topk.shape == (3, 3)
    if scored:
        assert np.concatenate([first.topk_ids, second.topk_ids]).tolist() == ids.tolist()
