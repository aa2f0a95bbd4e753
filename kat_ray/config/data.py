"""Where prompts and held-out problems come from, and how answers to them are graded."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kat_ray.config.cluster import Resumable, Section
from kat_ray.config.local_paths import LocalPath
from kat_ray.config.presets import Preset, with_preset
from kat_ray.rewards.limits import GradingLimits

_NAME_RE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

# Arguments of a chat template, or of the call that applies it, which are not the user's.
_SET_BY_US = frozenset(
    ("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages", "padding",
     "return_dict", "return_tensors", "return_assistant_tokens_mask", "tokenize", "tokenizer_kwargs", "truncation")
)  # fmt: skip


class MixedData(Section):
    """One of several data sets that prompts are drawn from."""

    path: LocalPath = Field(min_length=1)
    """A .jsonl or .parquet file, or a Hugging Face data set id."""
    name: str | None = Field(None, min_length=1)
    """As `data.name`."""
    revision: str | None = Field(None, min_length=1)
    """As `data.revision`."""
    split: str = "train"
    """As `data.split`."""
    streaming: bool = False
    """As `data.streaming`."""
    rename: dict[str, str] = Field({})
    """As `data.rename`, onto the names by which `data` reads its columns."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many prompts of it; null uses all."""
    weight: float = Field(1.0, gt=0)
    """Its share in an epoch, beside `data.weight` and the weights of the others."""


class DataConfig(Section):
    """Prompts of one split."""

    path: LocalPath = Field(min_length=1)
    """A .jsonl or .parquet file, a Hugging Face data set id, `demo:train` / `demo:heldout`, or `environment:train`
    / `environment:heldout`."""
    name: str | None = Field(None, min_length=1)
    """Configuration of a Hugging Face data set that has several, such as `main` of openai/gsm8k; not used for
    files."""
    revision: str | None = Field(None, min_length=1)
    """Hub revision of a data set (branch, tag or commit); null takes the default branch. Not used for files."""
    split: str = "train"
    """Split of a Hugging Face data set, or a slice or sum of them: `train[:1000]`, `train[10%:20%]`, `train+test`;
    not used for files."""
    streaming: bool = False
    """Read a Hugging Face data set from its beginning, as far as `limit` or the slice of `split` (`train[:1000]`)
    asks, without downloading it whole; not used for files."""
    rename: dict[str, str] = Field({})
    """Columns by the names that they have, or dotted paths of them, with those that they are read by:
    {question: prompt}."""
    prompt_column: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages with `chat_template`. A dotted path names a
    field within a column, such as `reward_model.ground_truth`; a column of that very name comes first."""
    answer_column: str | None = "answer"
    """Column with the gold answer, or dotted path of it; null where answers are not graded. Training data may lack
    the column `answer`, and then nothing is graded; any other name must be there."""
    completion_column: str | None = Field(None, min_length=1)
    """Column with a completion of the prompt, or dotted path of it, for objective.off_policy: text, or a list with
    one message of the assistant. Every row must have one. Not of held-out problems."""
    teacher_column: str | None = Field(None, min_length=1)
    """Column in which a prompt names its teacher of the section `teachers`, or dotted path of it; a row without a
    value has the section `teacher`. A name that no teacher has is refused. Not of held-out problems."""
    source_column: str | None = Field(None, min_length=1)
    """Column that says what a prompt is from, such as verl's `data_source`, or dotted path of it: pass rate, reward
    and length of rollouts are then shown for each of its values, at most 50 (metrics source/...). null: of an
    environment's problems their family, of others nothing. Not of held-out problems."""
    chat_template: bool | Annotated[str, Field(min_length=1)] = False
    """Chat template that makes a prompt (with the start of an answer): `true` or `student` applies the student's,
    `teacher` the teacher's, a path that of a file (Jinja); `false` applies none."""
    chat_template_kwargs: dict[str, bool | int | float | str | None] = Field({})
    """Further arguments of the chat template, such as {enable_thinking: false}."""
    system_prompt: str | None = None
    """System message put before a string prompt; needs `chat_template`."""
    instruction: str | None = Field(None, min_length=1)
    """Text put behind a string prompt, after an empty line, such as how an answer is to be written."""
    answer_after: str | None = Field(None, min_length=1)
    """The gold answer is what stands behind the last of this mark in its column: `####` of openai/gsm8k. A row
    without the mark has no answer."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many prompts; null uses all."""
    dedupe: bool = False
    """Leave out a row that repeats an earlier one: the same tokens of the prompt for the same teacher, and of what
    the teacher is told (teacher.context) and of the completion (`completion_column`) where there are any; how many
    is said."""
    weight: float = Field(1.0, gt=0)
    """With `mix`: the share of this data set in an epoch, beside the weights of the others."""
    mix: dict[str, MixedData] = Field({})
    """Further data sets by name, from which prompts are drawn too, each as often as its weight says; their columns
    are read by the names of this one (docs/data.md)."""
    too_long: Literal["skip", "refuse"] = "skip"
    """A prompt longer than the model takes is skipped and counted, or the run is refused."""
    shuffle: bool = True
    """Shuffle each epoch with `run.seed`; off keeps the file's order."""

    @model_validator(mode="after")
    def _system_needs_template(self) -> DataConfig:
        if self.system_prompt is not None and not self.chat_template:
            raise ValueError("system_prompt: needs chat_template = true")
        if self.chat_template_kwargs and not self.chat_template:
            raise ValueError("chat_template_kwargs: needs chat_template = true")
        if self.weight != 1.0 and not self.mix:
            raise ValueError(
                f"weight = {self.weight:g}: is a share beside those of other data sets; name them in mix"
            )
        if (self.path.startswith("environment:") or self.teacher_column is not None) and self.mix:
            raise ValueError("mix: is of files and data sets, without an environment and without teacher_column")
        if wrong := next((name for name in self.mix if name == "data" or not _NAME_RE.fullmatch(name)), None):
            raise ValueError(f"mix: {wrong!r} is no name of a data set: letters, digits, _ and -, and not data")
        if taken := _SET_BY_US & self.chat_template_kwargs.keys():
            raise ValueError(f"chat_template_kwargs.{min(taken)}: is set by the run itself")
        return self

    @property
    def names_answers(self) -> bool:
        """Whether a column of answers was chosen: then it must be there, and be usable."""
        return self.answer_column not in (None, type(self).model_fields["answer_column"].default)


class HeldOutSet(Section):
    """One more set of held-out problems. Where a field is null, that of `evaluation` counts."""

    preset: Preset | None = None
    """As `evaluation.preset`."""
    data: DataConfig | None = None
    """Its problems, with fields as those of `data`; of a preset those that are given here come first."""
    verifier: Literal["integer", "math"] | None = None
    """As `evaluation.verifier`."""
    k: int | None = Field(None, ge=1)
    """Samples per problem."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens of an answer."""
    temperature: float | None = Field(None, ge=0, le=2)
    """Sampling temperature; vLLM takes none above 2."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Nucleus sampling."""
    greedy: bool | None = None
    """As `evaluation.greedy`."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, tree: Any) -> Any:
        return with_preset(tree)

    @model_validator(mode="after")
    def _has_problems_with_answers(self) -> HeldOutSet:
        if self.data is None:
            raise ValueError("data is missing: name its problems, or a preset")
        _refuse_unusable(self.data)
        if self.data.completion_column is not None:
            raise ValueError(
                f"data.completion_column = {self.data.completion_column!r}: held-out problems are not learnt from; "
                "leave it out"
            )
        if self.data.path.startswith("environment:"):
            raise ValueError(f"data.path = {self.data.path!r}: only evaluation.data is made by the environment")
        return self


def _refuse_unusable(data: DataConfig) -> None:
    if data.mix:
        raise ValueError("data.mix: is of training data; name held-out sets of their own in evaluation.sets")
    if data.answer_column is None:
        raise ValueError("data.answer_column = null: held-out problems need a column with the gold answer")
    if data.source_column is not None:
        raise ValueError(
            f"data.source_column = {data.source_column!r}: metrics by source are of rollouts of training, "
            "not of held-out problems; leave it out"
        )


class EvaluationConfig(Section):
    """avg@k and pass@k on held-out problems, through the same samplers."""

    preset: Preset | None = None
    """Held-out problems by name, with their hub id, columns, verifier and k: gsm8k, math500 (MATH-500), aime24,
    aime25, amc23, minerva (Minerva Math). Fields that are given come first, such as data.chat_template and
    data.path."""
    data: DataConfig | None = None
    """Held-out problems; null switches evaluation off."""
    verifier: Literal["integer", "math", "environment"] = "integer"
    """`integer`: the last stated integer (`answer N`, `\\boxed{N}`, `#### N`, `**N**`), or else the last integer of
    the text, exactly; `math`: math-verify (LaTeX); `environment`: the scorer of what made the problem."""
    grading_processes: Resumable[int] = Field(4, ge=1)
    """Child processes that grade at the same time, of a verifier that needs them (not `integer`)."""
    grading_seconds: Resumable[float] = Field(5.0, gt=0)
    """Seconds after which the grading of one answer is ended. It is counted as `ran_out`; an evaluation takes it
    for wrong, training has no verdict on it."""
    grading_step_seconds: Resumable[float] = Field(60.0, gt=0)
    """Seconds that grading the rollouts of one step (of each batch that it samples) may take in all; those not
    reached have no verdict, and are counted. An evaluation has `cluster.step_timeout`."""
    grading_memory_gib: Resumable[float] = Field(1.0, ge=0.25)
    """Memory of one grading process, GiB; an answer that needs more is counted as one that took too long is."""
    k: int = Field(4, ge=1)
    """Samples per problem."""
    every: Resumable[int] = Field(0, ge=0)
    """Steps between evaluations; 0 evaluates only before and after."""
    every_k: Resumable[int | None] = Field(None, ge=1)
    """Samples per problem in the evaluations between the first and the last, at most `k`; null takes `k`. Their
    pass@k is that of fewer answers."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens of an answer; null takes `rollout.max_tokens`."""
    temperature: float = Field(1.0, ge=0, le=2)
    """Sampling temperature; vLLM takes none above 2."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus sampling."""
    greedy: bool = False
    """Also answer each problem once with temperature 0."""
    sets: dict[str, HeldOutSet] = Field({})
    """Further held-out sets by name, evaluated when `data` is; only `data` chooses the best checkpoint and is
    watched by guards."""
    teacher: bool = True
    """Also evaluate the teacher before training: a wrong template or grader shows there."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, tree: Any) -> Any:
        return with_preset(tree)

    def parts(self) -> dict[str, EvaluationConfig]:
        """What is evaluated, each as if it were alone, by name: "" is `data`, which comes first.

        A greedy answer to each problem is a part of its own: `greedy`, or `NAME/greedy`.
        """
        alone = {"greedy": False, "sets": {}}
        found = {} if self.data is None else {"": self.model_copy(update=alone)}
        found |= {name: self._with(own).model_copy(update=alone) for name, own in self.sets.items()}
        asked = {"": self.greedy} | {n: self.greedy if s.greedy is None else s.greedy for n, s in self.sets.items()}
        parts: dict[str, EvaluationConfig] = {}
        for name, part in found.items():
            parts[name] = part
            if asked[name]:
                once = {"k": 1, "every_k": None, "temperature": 0.0}
                parts[f"{name}/greedy".lstrip("/")] = part.model_copy(update=once)
        return parts

    def _with(self, own: HeldOutSet) -> EvaluationConfig:
        fields = ("data", "verifier", "k", "max_tokens", "temperature", "top_p")
        given = {name: value for name in fields if (value := getattr(own, name)) is not None}
        return self.model_copy(update={"preset": own.preset, "every_k": None, **given})

    @model_validator(mode="after")
    def _sets_are_named(self) -> EvaluationConfig:
        if self.sets and self.data is None:
            raise ValueError(
                "sets: are evaluated beside evaluation.data, which is null; give it the first of them, or a preset"
            )
        for name in self.sets:
            if name == "greedy" or _NAME_RE.fullmatch(name) is None:
                raise ValueError(f"sets: {name!r} is no name of a set: letters, digits, _ and -, and not greedy")
        return self

    @model_validator(mode="after")
    def _answers_are_graded(self) -> EvaluationConfig:
        if self.data is not None:
            _refuse_unusable(self.data)
        return self

    @model_validator(mode="after")
    def _no_more_answers_along_the_way(self) -> EvaluationConfig:
        if self.every_k is not None and self.every_k > self.k:
            raise ValueError(f"every_k = {self.every_k}: must be <= {self.k}, the samples of evaluation.k")
        return self

    @property
    def grading_limits(self) -> GradingLimits:
        """Bounds of the processes that grade."""
        return GradingLimits(
            processes=self.grading_processes,
            seconds=self.grading_seconds,
            total_seconds=self.grading_step_seconds,
            memory_gib=self.grading_memory_gib,
        )
