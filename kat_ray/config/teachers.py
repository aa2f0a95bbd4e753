"""The models of a run: the student, and the teachers by name, each with its scorers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from kat_ray.config.cluster import LoraConfig, Resumable, ScorerConfig, Section, changed_fields
from kat_ray.config.context import check_context
from kat_ray.config.http_teacher import HttpConfig, Urls, check_urls
from kat_ray.config.local_paths import LocalPath
from kat_ray.types.records import DEFAULT_TEACHER

Dtype = Literal["float32", "bfloat16", "float16"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class ModelConfig(Section):
    """One causal language model: a Hugging Face directory or hub id."""

    path: LocalPath = Field(min_length=1)
    """Directory with config.json and safetensors, or a hub id. A directory is taken when it exists;
    `demo:student` and `demo:teacher` name the embedded models."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null takes the default branch. A run resolves it once, at its start,
    and its own config.yaml has the commit."""
    dtype: Dtype = "bfloat16"
    """Data type of the weights while sampling and scoring."""
    trust_remote_code: bool = False
    """Run Python code that the model directory brings. Off: such models are refused."""
    allow_pickle: bool = False
    """Accept weights that are not safetensors (pickle can run code). Off: they are refused."""


class TeacherConfig(ModelConfig):
    """A model that scores rollouts. Its scorers are those of the section `scorer`."""

    type: Literal["local", "http"] = "local"
    """`local`: scorers load it. `http`: they ask a server that has it, at `url`; `path` then names its
    configuration and tokenizer, `dtype` what the server computes in; weights are not read (docs/teachers.md)."""
    url: Resumable[Urls | None] = None
    """Where the server is, such as http://10.0.0.5:8000, of type = http: `kat-ray serve-teacher`, or vLLM's. Of
    several each scorer takes one, and another where that does not answer."""
    http: Resumable[HttpConfig] = HttpConfig()
    """How it is asked."""
    weight: float = Field(1.0, gt=0)
    """What the KL of its rollouts' tokens is multiplied by in the loss, which is divided by the kept tokens of all
    teachers' rollouts."""
    context: str | None = Field(None, min_length=1)
    """What it is told in place of the prompt, which the student alone has then: text in which {column} stands for a
    column of the data, {prompt} for the prompt; null tells it the prompt. With data.chat_template it takes the
    place of the last message's text (docs/teachers.md)."""

    chat_template: Literal["data", "own"] = "data"
    """Whose chat template renders what it is given: that of the prompts (data.chat_template), or its tokenizer's
    own, where it was trained on another than the student."""
    weights: Literal["given", "live", "average"] = "given"
    """Whose weights it has: those that its path names, for the whole run (`given`), or the student's, which path
    then names, too: the newest that were published (`live`, which needs a `context`), or their moving average
    (`average`)."""
    average_decay: float = Field(0.99, gt=0, lt=1)
    """Share of the average that is kept at each step, the rest is the student's new weights; of weights = average.
    One for all teachers of a run."""

    @field_validator("context")
    @classmethod
    def _is_a_template(cls, context: str | None) -> str | None:
        return None if context is None else check_context(context)

    @model_validator(mode="after")
    def _has_an_average(self) -> TeacherConfig:
        if self.weights != "average" and "average_decay" in changed_fields(self):
            raise ValueError(
                f"average_decay = {self.average_decay:g}: is of weights = 'average', and weights is "
                f"{self.weights!r}; leave it out, or set weights = 'average'"
            )
        return self

    @model_validator(mode="after")
    def _has_a_server(self) -> TeacherConfig:
        asked = {"url": self.url} if self.url is not None else {}
        asked |= {f"http.{name}": value for name, value in changed_fields(self.http).items()}
        for name, value in asked.items() if self.type == "local" else ():
            raise ValueError(
                f"{name} = {value!r}: is of a teacher with type = 'http', and type is 'local'; leave it out, or "
                "set type = 'http'"
            )
        if self.type == "http" and not self.urls:
            raise ValueError("type = 'http': needs url, the address of the teacher's server")
        if self.type == "http" and self.weights != "given":
            raise ValueError(
                f"weights = {self.weights!r}: needs type = 'local'; a server is given no weights of the student"
            )
        check_urls(self.urls, "url")
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses, without a slash at the end; none of a local teacher."""
        given = [self.url] if isinstance(self.url, str) else self.url or []
        return tuple(url.rstrip("/") for url in given)

    @property
    def is_remote(self) -> bool:
        """Whether a server has it."""
        return self.type == "http"


class NamedTeacherConfig(TeacherConfig):
    """A model that scores the rollouts of prompts whose `data.teacher_column` has its name."""

    scorer: Resumable[ScorerConfig] = ScorerConfig()
    """Its scorers: fields of the section `scorer`, from which those that are left out are taken. Names of one
    checkpoint share their scorers."""


@dataclass(frozen=True)
class ScorerGroup:
    """Scorers of one checkpoint, and the names of the teachers whose rollouts they score."""

    teachers: tuple[str, ...]
    model: TeacherConfig  # the first one's
    scorer: ScorerConfig

    @property
    def name(self) -> str:
        """Of the first of its teachers."""
        return self.teachers[0]

    @property
    def follows_student(self) -> bool:
        """Whether its scorers are given the student's weights, as samplers are."""
        return self.model.weights != "given"

    @property
    def engine(self) -> Literal["transformers", "vllm", "http"]:
        """What its scorers run, or that they ask a server."""
        return "http" if self.model.is_remote else self.scorer.engine

    @property
    def chunk_block(self) -> int:
        """Tokens of a rollout that its chunks end at a multiple of."""
        return 1 if self.model.is_remote else self.scorer.chunk_block

    @property
    def section(self) -> str:
        """Where the configuration names the model."""
        return section_of(self.name)

    @property
    def scorer_section(self) -> str:
        """Where the configuration describes the scorers."""
        return "scorer" if self.name == DEFAULT_TEACHER else f"{self.section}.scorer"

    @property
    def role(self) -> str:
        """What its scorers are called in placement groups, logs and pools."""
        return "scorer" if self.name == DEFAULT_TEACHER else f"scorer-{self.name}"


def section_of(teacher: str) -> str:
    """Where the configuration names a teacher's model."""
    return "teacher" if teacher == DEFAULT_TEACHER else f"teachers.{teacher}"


def check_names(teachers: Mapping[str, NamedTeacherConfig]) -> None:
    """ValueError where a name cannot be one: it stands in names of actors, metrics and fields."""
    for name in teachers:
        if name == DEFAULT_TEACHER:
            raise ValueError(f"teachers.{name}: this one is the section `teacher`; write teacher.path")
        if not _NAME.fullmatch(name):
            raise ValueError(f"teachers: {name!r} must be letters, digits, - and _, as in code-2")


def check_column(teachers: Mapping[str, NamedTeacherConfig], column: str | None, heldout: str | None) -> None:
    """ValueError where prompts do not name teachers, or name some that there are none of."""
    if teachers and column is None:
        raise ValueError(
            f"teachers.{next(iter(teachers))}: needs data.teacher_column, the column in which a prompt names its "
            "teacher; a teacher of all prompts is the section `teacher`"
        )
    if column is not None and not teachers:
        raise ValueError(
            f"data.teacher_column = {column!r}: names teachers, and there are none by name: add them as "
            "teachers.NAME.path, or leave the column out"
        )
    if heldout is not None:
        raise ValueError(
            f"evaluation.data.teacher_column = {heldout!r}: held-out problems have no teacher; leave it out"
        )


def check_student_as_teacher(
    name: str, teacher: TeacherConfig, student: ModelConfig, scorer: ScorerConfig, lora: LoraConfig | None
) -> None:
    """ValueError where a teacher that is the student cannot be it."""
    if teacher.weights == "given":
        return
    section, live = section_of(name), f"{section_of(name)}.weights = {teacher.weights!r}"
    for field in ModelConfig.model_fields:
        own, students = getattr(teacher, field), getattr(student, field)
        if own != students:
            raise ValueError(f"{live}: {section}.{field} = {own!r}: must be {students!r}, that of the student")
    if teacher.context is None and teacher.weights == "live":
        raise ValueError(
            f"{live}: needs {section}.context; told the same as the student, the student has nothing to teach it"
        )
    if scorer.engine == "vllm":
        raise ValueError(
            f"{live}: its scorers take new weights with backend = 'transformers' only, not {scorer.backend!r}"
        )
    if lora is not None and lora.publish == "adapters":
        raise ValueError(
            f"{live}: its scorers take whole weights, and learner.lora.publish = 'adapters' publishes none; "
            "'merged' does"
        )


def average_decay_of(teachers: Mapping[str, TeacherConfig]) -> float | None:
    """The decay of the student's average, None where no teacher has it; ValueError where there would be two."""
    decays = {name: t.average_decay for name, t in teachers.items() if t.weights == "average"}
    if len({*decays.values()}) > 1:
        first, second, *_ = (f"{section_of(name)}.average_decay = {decay:g}" for name, decay in decays.items())
        raise ValueError(f"{second}: must be that of {first}; a run keeps one average of the student")
    return next(iter(decays.values()), None)


def with_common_scorer(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's tree in which the scorers of each named teacher have the fields of the section `scorer`."""
    teachers, common = tree.get("teachers"), _fields(tree.get("scorer"))
    if not isinstance(teachers, Mapping) or common is None:
        return dict(tree)
    return {**tree, "teachers": {name: _completed(one, common) for name, one in teachers.items()}}


def _completed(teacher: Any, common: Mapping[str, Any]) -> Any:
    """Whatever is of a wrong kind is left for the validation to refuse."""
    if not isinstance(teacher, Mapping):
        return teacher
    own = _fields(teacher.get("scorer"))
    return teacher if own is None else {**teacher, "scorer": {**common, **own}}


def _fields(section: Any) -> Mapping[str, Any] | None:
    """The fields that are given of a section; None where it is none."""
    if isinstance(section, BaseModel):
        return section.model_dump(exclude_unset=True)
    return {} if section is None else section if isinstance(section, Mapping) else None


def groups_of(teachers: Mapping[str, TeacherConfig], common: ScorerConfig) -> tuple[ScorerGroup, ...]:
    """Teachers by the checkpoint that they are, in the order of their names; `common` are those of `default`.

    ValueError where names of one checkpoint ask for different scorers.
    """
    found: dict[tuple[object, ...], ScorerGroup] = {}
    for name, teacher in teachers.items():
        scorer = teacher.scorer if isinstance(teacher, NamedTeacherConfig) else common
        model = ModelConfig(**{field: getattr(teacher, field) for field in ModelConfig.model_fields})
        key = (model, teacher.weights, teacher.urls)
        group = found.get(key)
        if group is not None and group.model.http != teacher.http:
            raise ValueError(
                f"{section_of(name)}.http: asks the server of {group.section} in another way; names of one server "
                "share their scorers: give both the same fields"
            )
        if group is not None and group.scorer != scorer:
            raise ValueError(
                f"{section_of(name)}.path = {teacher.path!r}: is the checkpoint of {group.section}, whose scorers "
                f"both have: give {group.scorer_section} and {section_of(name)}.scorer the same fields"
            )
        names = (*group.teachers, name) if group else (name,)
        found[key] = ScorerGroup(names, group.model if group else teacher, scorer)
    return tuple(found.values())


def check_servers(groups: Sequence[ScorerGroup], hang_timeout: float) -> None:
    """ValueError where scorers that ask a server are to have a GPU, or to wait for longer than they may hang."""
    for group in groups:
        if not group.model.is_remote:
            continue
        scorer, http = group.scorer, group.model.http
        if scorer.num_gpus or scorer.backend != "auto":
            what, other = f"num_gpus = {scorer.num_gpus:g}", "num_gpus = 0"
            if not scorer.num_gpus:
                what, other = f"backend = {scorer.backend!r}", "backend = 'auto'"
            raise ValueError(
                f"{group.scorer_section}.{what}: {group.section}.type = 'http', whose scorers run no model: the "
                f"server's own command says what it runs on; set {other}"
            )
        if http.retry_seconds >= hang_timeout:
            raise ValueError(
                f"{group.section}.http.retry_seconds = {http.retry_seconds:g}: must be < {hang_timeout:g}, "
                "cluster.hang_timeout, after which a scorer is taken for one that hangs"
            )
