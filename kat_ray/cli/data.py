"""`kat-ray data`: what the model will see of a data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from kat_ray.config import Config, DataConfig, EvaluationConfig
from kat_ray.config.load import EMBEDDED, config_from, load_config, resolve_path
from kat_ray.data.chat import chat_template_of
from kat_ray.data.prompts import PromptSet, load_prompts
from kat_ray.data.survey import distribution, refusals
from kat_ray.errors import UserError
from kat_ray.models.inspect import files_of, load_tokenizer
from kat_ray.types.records import Prompt

# Two backgrounds in turn show where a token ends; a special token has its own.
_STYLES = ("black on bright_cyan", "black on bright_yellow")
_SPECIAL = "bold white on magenta"
_BOUNDARY = "\u00b7"  # between tokens, where there are no colours
_MOST = 1500  # tokens of a prompt that are shown


def config_of(source: str, model: str | None, overrides: list[str]) -> Config:
    """The configuration that is meant: a file, a run's, or one made around a data set and a model."""
    path = resolve_path(source)
    if source in EMBEDDED or path.suffix in (".yaml", ".yml") or (path / "config.yaml").is_file():
        if model is not None:
            overrides = [f"student.path={json.dumps(model)}", *overrides]
        return load_config(path / "config.yaml" if path.is_dir() else source, overrides)
    if model is None:
        raise UserError(
            f"{source}: is a data set; name the model that is to see it with --model, such as demo:student"
        )
    # Nobody answers: a prompt has the room that an answer would take.
    tree = {"student": {"path": model}, "teacher": {"path": model}, "data": {"path": source}}
    return config_from(tree | {"rollout": {"max_tokens": 1}}, overrides)


def show(config: Config, heldout: str | None, count: int, console: Console) -> int:
    """Print what there is; returns the exit code, 1 where a run would be refused.

    `heldout` names a held-out set: "" is evaluation.data. None: the prompts of training.
    """
    part = config.evaluation if heldout is None else _part(config, heldout)
    data = config.data if heldout is None else part.data
    assert data is not None
    graded = heldout is not None
    tokenizer = load_tokenizer(config.student)
    own = {} if graded else {name: load_tokenizer(config.all_teachers[name]) for name in config.own_templates}
    named = config.teacher if data.chat_template == "teacher" else None
    teacher = None if named is None else load_tokenizer(named)
    template = chat_template_of(data, tokenizer, teacher)
    rows, refused = refusals(data, template, graded, config.environment)
    console.print(f"{data.path}: {rows:,} rows, {rows - sum(r.count for r in refused.values()):,} of them usable")
    for reason, found in refused.items():
        console.print(f"refused: {found.count:,} x {reason}; the first: {found.first}", style="red")
    if refused or not rows:
        return 1
    limit = _room(config, heldout)
    prompts = load_prompts(
        data, tokenizer, limit, graded=graded, teacher=teacher, environment=config.environment,
        teachers=None if graded else config.teacher_contexts, renderers=own,
    )  # fmt: skip
    for prompt in prompts.prompts[:count]:
        _show_prompt(prompt, tokenizer, console)
    for line in _left_out(part, data, prompts, limit):
        console.print(line)
    console.print("\ntokens of a prompt: ", end="")
    for line in distribution([len(p.token_ids) for p in prompts.prompts]):
        console.print(line)
    if heldout == "" and config.evaluation.sets:
        console.print(f"\nfurther held-out sets (--heldout NAME): {', '.join(config.evaluation.sets)}")
    return 0


def _part(config: Config, name: str) -> EvaluationConfig:
    """The held-out set of this name; "" is `evaluation.data`."""
    evaluation = config.evaluation
    if evaluation.data is None:
        raise UserError("--heldout: evaluation.data = null: there are no held-out problems")
    if name and name not in evaluation.sets:
        known = ", ".join(evaluation.sets) or "none"
        raise UserError(
            f"--heldout {name}: names no set of evaluation.sets (there are {known}); without a name it shows "
            "evaluation.data"
        )
    return evaluation.parts()[name]


def _room(config: Config, heldout: str | None) -> int | None:
    """Tokens that the student takes of a prompt; None where config.json does not say. Weights need not be there.

    `UserError` where an answer leaves none.
    """
    from transformers import AutoConfig

    directory, names = files_of(config.student)
    if "config.json" not in names:
        return None
    try:
        whole = AutoConfig.from_pretrained(directory, trust_remote_code=config.student.trust_remote_code)
    except (OSError, ValueError, KeyError):  # a run says what is wrong with it
        return None
    longest: int | None = getattr(whole.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return None
    field, answer = _answer(config, heldout)
    if answer >= longest:
        raise UserError(
            f"{field} = {answer}: must be < {longest}, the tokens that {config.student.path} takes "
            "(max_position_embeddings), with room for the prompt"
        )
    return longest - answer


def _answer(config: Config, heldout: str | None) -> tuple[str, int]:
    """Tokens of an answer, and the field that says so."""
    evaluation = config.evaluation
    fields = {"evaluation.max_tokens": None if heldout is None else evaluation.max_tokens}
    if heldout:
        fields = {f"evaluation.sets.{heldout}.max_tokens": evaluation.sets[heldout].max_tokens, **fields}
    fields["rollout.max_tokens"] = config.rollout.max_tokens
    return next((name, value) for name, value in fields.items() if value is not None)


def _show_prompt(prompt: Prompt, tokenizer: Any, console: Console) -> None:
    answer = "" if prompt.answer is None else f", answer {prompt.answer!r}"
    console.print(f"\n{prompt.prompt_id}: {len(prompt.token_ids)} tokens{answer}", style="bold")
    plain = console.no_color or console.color_system is None
    console.print(coloured(prompt.token_ids, tokenizer, plain))
    if prompt.context_ids is not None:
        console.print(f"the teacher is told ({len(prompt.context_ids)} tokens)", style="bold")
        console.print(coloured(prompt.context_ids, tokenizer, plain))


def coloured(ids: tuple[int, ...], tokenizer: Any, plain: bool) -> Text:
    """The tokens as text, each in the other colour than the one before; `plain` has a dot between them instead.

    A space at either end of a line is seen by its colour, a newline by an arrow. A token that is part of a
    character is shown by its name in the vocabulary.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    text = Text()
    for place, token in enumerate(ids[:_MOST]):
        piece = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not piece or "\ufffd" in piece:
            piece = str(tokenizer.convert_ids_to_tokens(token))
        if plain and place:
            text.append(_BOUNDARY)
        text.append(piece.replace("\n", "\u21b5\n"), _SPECIAL if token in special else _STYLES[place % 2])
    if len(ids) > _MOST:
        text.append(f" ... and {len(ids) - _MOST:,} tokens more")
    return text


def _left_out(part: EvaluationConfig, data: DataConfig, found: PromptSet, limit: int | None) -> Iterator[str]:
    if found.skipped_too_long:
        yield f"\nleft out: {found.skipped_too_long:,} prompts of more than {limit:,} tokens (data.too_long = skip)"
    if found.repeated:
        other = f"{found.contradicting:,} of them with another answer"
        yield f"\nleft out: {found.repeated:,} prompts that repeat another, {other} (data.dedupe)"
    if found.weights:
        there = {name: found.origins.count(name) for name in found.weights}
        shares = {name: weight / sum(found.weights.values()) for name, weight in found.weights.items()}
        words = ", ".join(f"{name} {shares[name]:.0%} ({there[name]:,} prompts)" for name in there)
        yield f"\nan epoch has {len(found.drawn):,} prompts: {words}"
    yield from _golds(part, data, found)


def _golds(part: EvaluationConfig, data: DataConfig, found: PromptSet) -> Iterator[str]:
    from kat_ray.rewards.verifiers import unmatchable

    answered = [p for p in found.prompts if p.answer is not None]
    if data.answer_column is None or not answered:
        yield "\nno prompt has a gold answer"
        return
    wrong = unmatchable(answered, part.verifier, part.grading_limits)
    yield (
        f"\ngold answers: {len(answered):,} of {len(found.prompts):,} prompts, {len(answered) - len(wrong):,} that "
        f"`{part.verifier}` can match"
    )
    for prompt, reason in list(wrong.items())[:1]:
        yield f"not matched, first of {len(wrong):,}: {prompt.prompt_id}: {reason}"


def run(source: str, model: str | None, heldout: str | None, count: int, overrides: list[str]) -> int:
    """The command."""
    return show(
        config_of(source, model, overrides),
        heldout,
        count,
        Console(soft_wrap=True, emoji=False, markup=False, highlight=False),
    )
