"""What a run's chat template says of its models: a turn's end is a stop id, and whose template it is.

Models are inspected without the data that they are to answer. Here the two meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kat_ray.config import Config, DataConfig
from kat_ray.config.teachers import section_of
from kat_ray.data.chat import ChatTemplate, chat_template_of, teachers_own, turn_end
from kat_ray.errors import DataError
from kat_ray.models.inspect import ModelFacts, ModelInfo
from kat_ray.types.records import DEFAULT_TEACHER


def with_chat(config: Config, facts: ModelFacts) -> ModelFacts:
    """The facts with the ids that end a turn of the chat templates among those that end a text, of every model.

    A base model's generation_config.json knows none of a template that it was given, and a model may say there
    less than its own template does: it would then answer the question and go on to the next one. `DataError` for a
    template that cannot be had.
    """
    sections = {"data": config.data, "evaluation.data": config.evaluation.data}
    for section, data in sections.items():
        template = _template(data, facts)
        if template is None:
            continue
        end = turn_end(template)
        if end is not None:
            facts = _joined(facts, end, section)
    for name, tokenizer in facts.renderers(config).items():
        end = turn_end(teachers_own(config.data, tokenizer, section_of(name)))
        facts = facts if end is None else _joined(facts, end, section_of(name))
    if (template := _template(config.data, facts)) is not None:
        more = [*_other_templates(config, facts, template)]
        facts = replace(facts, warnings=(*facts.warnings, *more))
    return facts


def _template(data: DataConfig | None, facts: ModelFacts) -> ChatTemplate | None:
    return None if data is None else chat_template_of(data, facts.tokenizer, facts.teacher_tokenizer)


def _joined(facts: ModelFacts, end: int, section: str) -> ModelFacts:
    student = facts.student
    joined = replace(
        facts,
        student=_with(student, end),
        teachers={name: _with(info, end) for name, info in facts.teachers.items()},
        stop_ids=tuple(sorted({*facts.stop_ids, end})),
    )
    if end in facts.stop_ids:  # a difference between the models has been told
        return joined
    token = facts.tokenizer.convert_ids_to_tokens

    def shown(ids: tuple[int, ...]) -> str:
        return ", ".join(f"{i} {token(i)!r}" for i in ids)

    warning = (
        f"{section}.chat_template ends a turn with {shown((end,))}, and the student's generation_config.json a "
        f"text with {shown(student.stop_ids)}: each of them ends its rollouts and answers, in its checkpoints too"
    )
    return replace(joined, warnings=(*facts.warnings, warning))


def _with(info: ModelInfo, end: int) -> ModelInfo:
    if end in info.stop_ids or end >= info.vocabulary:
        return info
    return replace(info, stop_ids=tuple(sorted((*info.stop_ids, end))))


def _other_templates(config: Config, facts: ModelFacts, template: ChatTemplate) -> Iterator[str]:
    """A line where the teacher has a template of its own that makes another text of the same messages."""
    tokenizer = facts.teacher_tokenizer
    if DEFAULT_TEACHER in config.own_templates or config.data.chat_template == "teacher":
        return
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return
    messages = [{"role": "user", "content": "A question?"}]
    try:
        own = replace(template, text=str(tokenizer.get_chat_template()), tokenizer=tokenizer)
        theirs, ours = own.render(messages, "teacher"), template.render(messages, "data.chat_template")
    except (DataError, ValueError):  # it has several, or takes other messages
        return
    if theirs != ours:
        yield (
            f"the teacher's own chat template makes {_some(theirs)} of a question, and the one in use "
            f"(data.chat_template = {str(config.data.chat_template).lower()}) {_some(ours)}: the teacher scores "
            "texts unlike those that it was trained on; data.chat_template = teacher renders prompts as it knows "
            "them, and teacher.chat_template = own what it alone is given"
        )


def _some(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
