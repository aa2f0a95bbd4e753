"""Chat messages as text: whose template is applied, and which messages it may be given."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kat_ray.config import DataConfig
from kat_ray.config.load import resolve_path
from kat_ray.data.rows import kind
from kat_ray.errors import DataError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and what it is given beside the messages."""

    text: str  # Jinja
    tokenizer: Any  # whose special tokens stand in it
    arguments: Mapping[str, Any]
    own: bool = True  # the student's, which says itself whether a text begins with a special token

    def render(self, messages: Sequence[Message], where: str, answered: bool = False) -> str:
        """The messages as text, with the start of an answer; `DataError` where the template refuses them.

        With `answered` the last of them is an answer, and none is begun.
        """
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=not answered,
                **self.arguments,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"{where}: the chat template refuses the messages: {error}") from error
        return str(text)


def chat_template_of(data: DataConfig, student: Any, teacher: Any = None) -> ChatTemplate | None:
    """The template that `data.chat_template` names, None for none; `student` and `teacher` are tokenizers."""
    source = data.chat_template
    if not source:
        return None
    if source is True or source in ("student", "teacher"):
        name = "teacher" if source == "teacher" else "student"
        tokenizer = teacher if source == "teacher" else student
        text = _own_template(tokenizer, source, name)
    else:
        tokenizer, text = student, _file(str(source))
    for argument in data.chat_template_kwargs:
        if not re.search(rf"\b{re.escape(argument)}\b", text):
            raise DataError(f"data.chat_template_kwargs.{argument}: the chat template does not use this name")
    return ChatTemplate(text, tokenizer, data.chat_template_kwargs, own=source is True or source == "student")


def turn_end(template: ChatTemplate) -> int | None:
    """The special token with which a template ends an answer, such as `<|im_end|>`; None where it has none.

    It is looked for behind the answer of a conversation of two messages. Space may stand before it.
    """
    answer = "An answer, and its end."
    messages = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        text = template.render(messages, "data.chat_template", answered=True)
    except DataError:  # of tools, for example: the prompts may be others
        return None
    rest = text.rpartition(answer)[2].lstrip() if answer in text else ""
    ids = template.tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else []
    return int(ids[0]) if ids and ids[0] in template.tokenizer.added_tokens_decoder else None


def opening(tokenizer: Any) -> int | None:
    """The id that a tokenizer puts before every text (BOS); None where it puts none, or several."""
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    before = whole[: len(whole) - len(bare)]
    return int(before[0]) if len(before) == 1 and whole[1:] == bare else None


def encode(
    tokenizer: Any, template: ChatTemplate | None, texts: Sequence[str | None]
) -> list[tuple[int, ...] | None]:
    """The token ids of texts, None of None: each begins with BOS once, where the student's texts begin with one.

    A template of the student's says itself whether there is one. Another's, and a file's, may have left it to the
    tokenizer; and a text without a template may have been rendered before, and begin with one already.
    """
    given = [text for text in texts if text is not None]
    if not given:
        return [None] * len(texts)
    first = opening(tokenizer)
    found = iter(tokenizer(given, add_special_tokens=template is None)["input_ids"])

    def once(ids: Sequence[int]) -> tuple[int, ...]:
        if first is None:
            return tuple(ids)
        if template is None:
            return tuple(ids[1:] if list(ids[:2]) == [first, first] else ids)
        return tuple(ids) if template.own or list(ids[:1]) == [first] else (first, *ids)

    return [None if text is None else once(next(found)) for text in texts]


def teachers_own(data: DataConfig, teacher: Any, section: str) -> ChatTemplate:
    """The template of a teacher's tokenizer, for what it alone is given, with those arguments that it uses.

    `section` is where the configuration names the teacher.
    """
    if not getattr(teacher, "chat_template", None):
        raise DataError(f"{section}.chat_template = own: the teacher's tokenizer has no chat template; use data")
    text = _own_template(teacher, "teacher", "teacher")
    known = {n: v for n, v in data.chat_template_kwargs.items() if re.search(rf"\b{re.escape(n)}\b", text)}
    return ChatTemplate(text, teacher, known, own=False)


def _own_template(tokenizer: Any, source: bool | str, name: str) -> str:
    shown = "true" if source is True else source
    if not getattr(tokenizer, "chat_template", None):
        others = "teacher, or a file with one" if name == "student" else "student, or a file with one"
        raise DataError(
            f"data.chat_template = {shown}: the {name}'s tokenizer has no chat template; it may be {others}"
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several, and none is the default
        raise DataError(f"data.chat_template = {shown}: {error}") from error


def _file(name: str) -> str:
    try:
        return resolve_path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise DataError(
            f"data.chat_template = {name}: must be true, false, student, teacher or a file with a Jinja template; "
            f"as a file it cannot be read: {reason}"
        ) from error


def with_instruction(prompt: Any, data: DataConfig) -> Any:
    """What the prompt's column holds, with `data.instruction` behind it where it is text."""
    return f"{prompt}\n\n{data.instruction}" if isinstance(prompt, str) and data.instruction is not None else prompt


def messages_of(prompt: str | Sequence[Any], system: str | None, where: str) -> list[Message]:
    """The prompt as messages that an answer can follow; `DataError` names what cannot be one.

    Contents are text, or parts that are all text, which are joined. `system` is put before messages that have none.
    """
    messages = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(map(_checked(where), prompt))
    )
    if messages[-1]["role"] in ("assistant", "system"):
        raise DataError(
            f"{where}: the last message is the {messages[-1]['role']}'s; an answer follows a message of the user"
        )
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _checked(where: str) -> Any:
    def check(message: Any) -> Message:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"{where}: a message has role and content, this is {str(message)[:80]}")
        if not isinstance(message["role"], str):
            raise DataError(f"{where}: the role of a message is {kind(message['role'])}; it must be text")
        return {**message, "content": _text_of(message["content"], where)}

    return check


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        shown = "null" if content is None else kind(content)
        raise DataError(f"{where}: the content of a message is {shown}; it must be text, or a list of text parts")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}: a part of a message is {str(part)[:80]}; only {{type: text, text: ...}} can be used"
            )
    return "".join(part["text"] for part in content)
