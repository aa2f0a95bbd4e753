"""Teachers by name: what may be written, what follows from it, what is refused."""

import re

import pytest

from kat_ray.cluster.roles import roles_of, settings_of
from kat_ray.cluster.threads import threads_of
from kat_ray.config import Config, ScorerConfig
from kat_ray.config.load import load_config, save_config
from kat_ray.errors import ConfigError
from kat_ray.models.cpu_dtypes import slow_dtypes
from kat_ray.models.revisions import pinned_like
from kat_ray.models.support import roles_of as model_roles_of
from kat_ray.run.resume import changes

TWO = """\
student: {path: a}
teachers:
  math: {path: m, dtype: float32}
  code: {path: c, weight: 0.5, scorer: {replicas: 2, max_replicas: 3}}
scorer: {num_cpus: 0.5, max_batch_tokens: 64}
data: {path: p.jsonl, teacher_column: subject}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(TWO)
    return path


def test_scorers_of_a_teacher_have_the_fields_of_the_section_unless_they_say_otherwise(file, tmp_path):
    config = load_config(file)
    math, code = config.scorer_groups
    assert (math.teachers, math.role, math.section) == (("math",), "scorer-math", "teachers.math")
    assert math.scorer == config.scorer == ScorerConfig(num_cpus=0.5, max_batch_tokens=64)
    assert code.scorer == ScorerConfig(num_cpus=0.5, max_batch_tokens=64, replicas=2, max_replicas=3)
    assert [t.weight for t in config.used_teachers.values()] == [1.0, 0.5]
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


def test_the_section_teacher_is_the_one_of_the_name_default(file):
    config = load_config(file, ["teacher={path: t}"])
    assert [*config.used_teachers] == ["default", "math", "code"]
    assert [g.role for g in config.scorer_groups] == ["scorer", "scorer-math", "scorer-code"]
    alone = Config.model_validate({"student": {"path": "a"}, "teacher": {"path": "t"}, "data": {"path": "p"}})
    (group,) = alone.scorer_groups
    assert (group.name, group.role, group.section, group.scorer) == ("default", "scorer", "teacher", alone.scorer)


def test_two_names_of_one_checkpoint_share_a_group(file):
    config = load_config(file, ["teachers.prose={path: m, dtype: float32, weight: 3}"])
    assert [g.teachers for g in config.scorer_groups] == [("math", "prose"), ("code",)]
    other = load_config(file, ["teachers.prose={path: m, dtype: bfloat16}"])
    assert len(other.scorer_groups) == 3, "of another data type it is another model"


def test_each_group_is_placed_and_grows_for_itself(file):
    config = load_config(file, ["cluster.by_role=true"])
    roles = roles_of(config)
    assert [*roles] == ["learner", "sampler", "scorer-math", "scorer-code", "monitor"] == [*settings_of(config)]
    assert (roles["scorer-math"].bounds, roles["scorer-code"].bounds) == ((1, 1), (2, 3))
    assert roles["scorer-code"].labels == {"kat.ray/role": "scorer"} and roles["scorer-code"].bundle["scorer"] == 1
    assert threads_of(config, 12)["scorer-code"] == 2, "12 cores for one sampler, one scorer and up to three"
    assert model_roles_of(config)["teachers.code"] == ("scorer-transformers",)
    (line,) = slow_dtypes(
        load_config(file, ["student.dtype=float32", "learner.dtype=float32"]), frozenset({"avx2"})
    )
    assert line.startswith("teachers.code.dtype = bfloat16")


def test_a_resume_may_change_scorers_and_no_teacher(file):
    before = load_config(file)
    more = load_config(file, ["teachers.code.scorer.max_replicas=5", "teachers.math.scorer.num_cpus=2"])
    assert changes(before, more) == []
    other = load_config(file, ["teachers.code.weight=1", "teachers.math.path=n", "data.teacher_column=topic"])
    assert changes(before, other) == ["data.teacher_column", "teachers.code.weight", "teachers.math.path"]
    commit = "0" * 40
    pinned = load_config(file, [f"teachers.math.revision='{commit}'"])
    assert pinned_like(before, pinned).teachers["math"].revision == commit
    assert changes(pinned, pinned_like(before, pinned)) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.teacher_column=null"], "teachers.math: needs data.teacher_column, the column in which"),
        (
            ["teachers={}", "teacher={path: t}"],
            "data.teacher_column = 'subject': names teachers, and there are none by name",
        ),
        (["teachers.default={path: x}"], "teachers.default: this one is the section `teacher`; write teacher.path"),
        (["teachers={'a.b': {path: x}}"], "teachers: 'a.b' must be letters, digits, - and _"),
        (["teachers.code.path=m", "teachers.code.dtype=float32"],
         "teachers.code.path = 'm': is the checkpoint of teachers.math, whose scorers both have: give "
         "teachers.math.scorer and teachers.code.scorer the same fields"),
        (["data.chat_template=teacher"], "data.chat_template = 'teacher': is that of the section `teacher`"),
        (["evaluation.data={path: h, teacher_column: s}"], "held-out problems have no teacher"),
        (["teachers.code.scorer.replica=2"], "teachers.code.scorer.replica: unknown field; did you mean replicas?"),
        (["teachers.code.weight=0"], "teachers.code.weight = 0: must be a number > 0"),
        (["run.deterministic=true"], "needs a fixed number of scorers of teachers.code"),
        (["teachers.math.scorer={backend: vllm, num_gpus: 1}", "termination={rule: kat_stages}"], ""),
        (["rollout.rollouts_per_prompt=2", "rollout.top_p=1", "termination.budget=0.1",
          "objective.rl={weight: 1, advantage: rloo, aggregate: constant, cut_reward: probe_weighted}"],
         "each teacher has a share of probes of its own"),
    ],
)  # fmt: skip
def test_what_cannot_mean_anything_is_refused(file, overrides, said):
    if not said:
        load_config(file, overrides)
        return
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(file, overrides)


def test_teachers_that_nobody_asks_are_not_used(file):
    alone = ["objective.opd.weight=0", "objective.rl.weight=1", "termination={rule: none}"]
    more = ["rollout.rollouts_per_prompt=2", "rollout.top_p=1"]
    config = load_config(file, [*alone, *more])
    assert [*config.all_teachers] == ["math", "code"]
    assert not config.used_teachers and not config.scorer_groups and "monitor" not in roles_of(config)
