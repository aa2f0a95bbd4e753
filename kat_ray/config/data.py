"""Where prompts and held-out problems come from, and how answers to them are graded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kat_ray.config.cluster import Resumable, Section
from kat_ray.config.local_paths import LocalPath
from kat_ray.rewards.limits import GradingLimits

# Arguments of a chat template, or of the call that applies it, which are not the user's.
_SET_BY_US = frozenset(
    ("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages", "padding",
     "return_dict", "return_tensors", "return_assistant_tokens_mask", "tokenize", "tokenizer_kwargs", "truncation")
)  # fmt: skip


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
    """Split of a Hugging Face data set; not used for files."""
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
    limit: int | None = Field(None, ge=1)
    """Use only the first so many prompts; null uses all."""
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
        if taken := _SET_BY_US & self.chat_template_kwargs.keys():
            raise ValueError(f"chat_template_kwargs.{min(taken)}: is set by the run itself")
        return self

    @property
    def names_answers(self) -> bool:
        """Whether a column of answers was chosen: then it must be there, and be usable."""
        return self.answer_column not in (None, type(self).model_fields["answer_column"].default)


class EvaluationConfig(Section):
    """avg@k and pass@k on held-out problems, through the same samplers."""

    data: DataConfig | None = None
    """Held-out problems; null switches evaluation off."""
    verifier: Literal["integer", "math", "environment"] = "integer"
    """`integer`: the last stated integer (`answer N`, `\\boxed{N}`, `#### N`, `**N**`), or else the last integer of
    the text, exactly; `math`: math-verify (LaTeX); `environment`: the scorer of what made the problem."""
    grading_processes: Resumable[int] = Field(4, ge=1)
    """Child processes that grade at the same time, of a verifier that needs them (not `integer`)."""
    grading_seconds: Resumable[float] = Field(5.0, gt=0)
    """Seconds after which the grading of one answer is ended; the answer is wrong, and counted as `ran_out`."""
    grading_step_seconds: Resumable[float] = Field(60.0, gt=0)
    """Seconds that grading the rollouts of one step may take in all; those not reached are wrong and counted. An
    evaluation has `cluster.step_timeout`."""
    grading_memory_gib: Resumable[float] = Field(1.0, ge=0.25)
    """Memory of one grading process, GiB; an answer that needs more is wrong, and counted as `ran_out`."""
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
    teacher: bool = True
    """Also evaluate the teacher before training: a wrong template or grader shows there."""

    @model_validator(mode="after")
    def _answers_are_graded(self) -> EvaluationConfig:
        if self.data is not None and self.data.answer_column is None:
            raise ValueError("data.answer_column = null: held-out problems need a column with the gold answer")
        if self.data is not None and self.data.source_column is not None:
            raise ValueError(
                f"data.source_column = {self.data.source_column!r}: metrics by source are of rollouts of training, "
                "not of held-out problems; leave it out"
            )
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
