"""What a chat template adds to the stop ids, and when it is unlike the teacher's own."""

import json
import shutil

import pytest
from pydantic import ValidationError

from kat_ray.config import Config, DataConfig
from kat_ray.data.prompts import load_prompts
from kat_ray.errors import DataError
from kat_ray.models.inspect import check_models
from kat_ray.run.chat_facts import with_chat
from tests.support.configs import make_config
from tests.support.models import make_model
from tests.support.tokenizers import TEMPLATE, make_tokenizer

ENDED = TEMPLATE.replace("{% endfor %}", "<|end|>{% endfor %}")


def tokenizer_of(template):
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return tokenizer


@pytest.fixture
def facts_of(tmp_path):
    def facts(student=None, teacher=None, stops=(1,), evaluated=None, own=False, **data):
        from transformers import GenerationConfig

        for name, template in (("student", student), ("teacher", teacher)):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            make_model(tmp_path / name)
            tokenizer_of(template).save_pretrained(tmp_path / name)
            GenerationConfig(eos_token_id=[*stops]).save_pretrained(tmp_path / name)
        config = make_config(
            str(tmp_path / "student"), str(tmp_path / "teacher"), data={"path": "x.jsonl", **data},
            rollout={"max_tokens": 64},
            evaluation={"data": None if evaluated is None else {"path": "y.jsonl", **evaluated}},
        )  # fmt: skip
        teacher = config.teacher.model_copy(update={"chat_template": "own" if own else "data"})
        config = config.model_copy(update={"teacher": teacher})
        return with_chat(config, check_models(config))

    return facts


END = tokenizer_of(None).convert_tokens_to_ids("<|end|>")


def test_the_end_of_a_turn_ends_rollouts_and_answers_of_every_model(facts_of):
    facts = facts_of(student=ENDED, teacher=ENDED, chat_template=True)
    assert (
        facts.stop_ids == facts.end_ids == facts.student.stop_ids == facts.teachers["teacher"].stop_ids == (1, END)
    )
    assert facts.warnings == (
        f"data.chat_template ends a turn with {END} '<|end|>', and the student's generation_config.json a text "
        "with 1 '</s>': each of them ends its rollouts and answers, in its checkpoints too",
    )


@pytest.mark.parametrize(
    "case",
    [
        {"student": ENDED, "teacher": ENDED},  # which is not applied
        {"student": TEMPLATE, "teacher": TEMPLATE, "chat_template": True},  # which has no end
        {"student": ENDED, "teacher": ENDED, "chat_template": True, "stops": (1, END)},  # which is known
    ],
)
def test_nothing_is_added_or_said_where_nothing_differs(facts_of, case):
    facts = facts_of(**case)
    assert facts.warnings == () and facts.stop_ids == tuple(case.get("stops", (1,)))


def test_the_template_of_the_held_out_problems_counts_too(facts_of):
    facts = facts_of(student=ENDED, teacher=ENDED, evaluated={"chat_template": True})
    assert facts.stop_ids == (1, END) and "evaluation.data.chat_template ends a turn" in facts.warnings[0]


def test_a_teacher_that_knows_another_template_is_told_of(facts_of):
    other = TEMPLATE.replace("[{{ m.role }}]", "<{{ m.role }}>")
    (warning,) = facts_of(student=TEMPLATE, teacher=other, chat_template=True).warnings
    assert "'<user>A question?[assistant]'" in warning and "'[user]A question?[assistant]'" in warning
    assert "data.chat_template = teacher renders prompts as it knows them" in warning
    assert "teacher.chat_template = own" in warning
    assert facts_of(student=TEMPLATE, teacher=other, chat_template="teacher").warnings == ()
    assert facts_of(student=TEMPLATE, teacher=None, chat_template=True).warnings == ()


def test_a_template_that_is_not_there_is_refused_as_ever(facts_of):
    with pytest.raises(DataError, match="the student's tokenizer has no chat template"):
        facts_of(chat_template=True)


OTHER = TEMPLATE.replace("[{{ m.role }}]", "<{{ m.role }}>").replace("{% endfor %}", "</s>{% endfor %}")


def test_a_teacher_may_be_given_chats_by_its_own_template(facts_of, tmp_path):
    facts = facts_of(student=ENDED, teacher=OTHER, chat_template=True, own=True)
    assert facts.stop_ids == (1, END) and len(facts.warnings) == 1, "told of the end of a turn, not of the template"
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "hi"}\n{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}\n'
    )
    data = DataConfig(path=str(path), chat_template=True)
    found = load_prompts(
        data, facts.tokenizer, None, teacher=facts.teacher_tokenizer, teachers={"default": "{prompt}"},
        renderers={"default": facts.teacher_tokenizer},
    ).prompts  # fmt: skip
    decode = facts.tokenizer.decode
    assert [decode(p.token_ids) for p in found] == [
        "[user]hi<|end|>[assistant]", "[system]s<|end|>[user]u<|end|>[assistant]",
    ]  # fmt: skip
    assert [decode(p.context_ids) for p in found] == [
        "<user>hi</s>[assistant]", "<system>s</s><user>u</s>[assistant]",
    ]  # fmt: skip


@pytest.mark.parametrize("prompts_by", [True, "teacher"])
def test_each_named_teacher_may_be_given_chats_by_its_own_template(tmp_path, prompts_by):
    """Beside one that has the prompts' and one that shares a checkpoint and has them as well."""
    from transformers import GenerationConfig

    for name, template in (("student", ENDED), ("teacher", ENDED), ("other", OTHER)):
        make_model(tmp_path / name)
        tokenizer_of(template).save_pretrained(tmp_path / name)
        GenerationConfig(eos_token_id=[END if name == "student" else 1]).save_pretrained(tmp_path / name)
    rows = [{"prompt": "hi", "by": by, "more": "psst"} for by in (None, "own", "told", "same")]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    named = {"own": {"chat_template": "own"}, "told": {"chat_template": "own", "context": "{more}"}, "same": {}}
    other = {"path": str(tmp_path / "other"), "dtype": "float32"}
    config = make_config(
        str(tmp_path / "student"), str(tmp_path / "teacher"), rollout={"max_tokens": 64},
        data={"path": str(tmp_path / "p.jsonl"), "teacher_column": "by", "chat_template": prompts_by},
        teachers={name: other | own for name, own in named.items()}, objective={},
    )  # fmt: skip
    assert config.own_templates == ("own", "told") and len(config.scorer_groups) == 2
    facts = with_chat(config, check_models(config))
    assert facts.stop_ids == (1, END)
    found = load_prompts(
        config.data, facts.tokenizer, None, teacher=facts.teacher_tokenizer, teachers=config.teacher_contexts,
        renderers=facts.renderers(config),
    ).prompts  # fmt: skip
    decode = facts.tokenizer.decode
    assert {decode(p.token_ids) for p in found} == {"[user]hi<|end|>[assistant]"}
    assert [None if p.context_ids is None else decode(p.context_ids) for p in found] == [
        None, "<user>hi</s>[assistant]", "<user>psst</s>[assistant]", None,
    ]  # fmt: skip
    bare = {name: make_tokenizer() for name in config.own_templates}
    with pytest.raises(DataError, match=r"teachers\.own\.chat_template = own: the teacher's tokenizer has no chat"):
        load_prompts(config.data, facts.tokenizer, None, teacher=facts.teacher_tokenizer, renderers=bare)


def test_a_teacher_without_a_template_has_none_of_its_own(facts_of):
    with pytest.raises(
        DataError, match=r"teacher\.chat_template = own: the teacher's tokenizer has no chat template"
    ):
        facts_of(student=ENDED, chat_template=True, own=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"path": "x"}}, "teacher.chat_template = 'own': needs data.chat_template"),
        ({"data": {"path": "x", "chat_template": "teacher"}}, "teacher.chat_template = 'own': needs"),
        (
            {
                "data": {"path": "x", "teacher_column": "t"},
                "teachers": {"b": {"path": "c", "chat_template": "own"}},
            },
            "teachers.b.chat_template = 'own': needs data.chat_template",
        ),
    ],
)
def test_a_template_of_its_own_needs_one_of_the_students(changes, says):
    teacher = {} if "teachers" in changes else {"chat_template": "own"}
    tree = {"student": {"path": "a"}, "teacher": {"path": "b", **teacher}, **changes}
    with pytest.raises(ValidationError, match=says):
        Config.model_validate(tree)


def test_without_it_nothing_is_told_to_a_teacher():
    config = make_config("a", "b", data={"path": "x.jsonl", "chat_template": True})
    assert config.teacher_contexts == {"default": None} and not config.own_templates
