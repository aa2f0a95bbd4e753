"""Settings that would do nothing are refused by name; with their defaults, as a run writes them, they are not."""

import pytest

from kat_ray.config.load import config_yaml, load_config
from kat_ray.errors import ConfigError

ALONE = ("objective.opd.weight=0", "objective.rl.weight=1", "rollout.rollouts_per_prompt=4", "rollout.top_p=1",
         "termination.rule=none")  # fmt: skip
HTTP = ("teacher.type=http", "teacher.url=http://127.0.0.1:9")
GIVEN = ("objective.off_policy.share=0.25", "data.completion_column=solution")
AVERAGE = ("teacher.path=demo:student", "teacher.weights=average")


@pytest.mark.parametrize(
    ("overrides", "set_by", "said"),
    [
        (["teacher.average_decay=0.9"], AVERAGE,
         "teacher.average_decay = 0.9: is of weights = 'average', and weights is 'given'"),
        (["teacher.average_decay=0.9", "teacher.weights=live", "teacher.path=demo:student",
          "teacher.context='{answer}{prompt}'"], ["teacher.weights=average"],
         "teacher.average_decay = 0.9: is of weights = 'average', and weights is 'live'"),
        (["teachers={a: {path: x, average_decay: 0.9}}", "data.teacher_column=of"],
         ["teachers.a.weights=average", "teachers.a.path=demo:student", "teachers.a.dtype=float32"],
         "teachers.a.average_decay = 0.9: is of weights = 'average', and weights is 'given'"),
        (["teacher.http.concurrency=4"], HTTP,
         "teacher.http.concurrency = 4: is of a teacher with type = 'http', and type is 'local'"),
        (["teacher.http.token_env=NAME"], HTTP, "teacher.http.token_env = 'NAME': is of a teacher with type"),
        (["objective.off_policy.loss=sft"], GIVEN,
         "objective.off_policy.loss = 'sft': is of given completions, and share is 0"),
        (["objective.off_policy.weight=0.5"], GIVEN, "objective.off_policy.weight = 0.5: is of given completions"),
        (["objective.off_policy.steps=3"], GIVEN, "objective.off_policy.steps = 3: is of given completions"),
        ([*ALONE, "objective.opd.support=teacher"], ["objective.opd.weight=0.1"],
         "objective.opd.support = 'teacher': is of distillation, and opd.weight is 0"),
        (["learner={dtype: bfloat16, zero_stage: 1, reduce_dtype: float32}"], ["learner.zero_stage=2"],
         "learner.reduce_dtype = 'float32': changes sums of bfloat16 at ZeRO 2 and 3, and zero_stage is 1"),
        (["learner={dtype: bfloat16, zero_stage: 0, reduce_dtype: float32}"], ["learner.zero_stage=3"],
         "and zero_stage is 0"),
        (["learner={dtype: float32, zero_stage: 2, reduce_dtype: float32}"], ["learner.dtype=bfloat16"],
         "learner.reduce_dtype = 'float32': changes sums of bfloat16 at ZeRO 2 and 3, and dtype is 'float32'"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_refused(overrides, set_by, said):
    with pytest.raises(ConfigError) as refused:
        load_config("demo", overrides)
    assert said in str(refused.value)
    load_config("demo", [*overrides, *set_by])  # what it is of


def test_annealed_distillation_has_its_support():
    away = ["objective.opd={support: teacher, weight: 1, final_weight: 0, anneal_steps: 3}"]
    assert load_config("demo", [*ALONE[1:], *away]).objective.opd.support == "teacher"


@pytest.mark.parametrize(
    "overrides",
    [(), ALONE, HTTP, GIVEN, AVERAGE, ("learner={dtype: bfloat16, zero_stage: 2, reduce_dtype: float32}",)],
)
def test_what_a_run_has_written_is_read_again(tmp_path, overrides):
    """Every field spelled out, those without effect with their defaults."""
    config = load_config("demo", overrides)
    file = tmp_path / "config.yaml"
    file.write_text(config_yaml(config))
    assert load_config(file) == config


@pytest.mark.parametrize("section", ["scorer", "teachers.math.scorer"])
def test_a_teacher_on_vllm_without_a_gpu_is_refused_before_anything_starts(section):
    named = ["teachers={math: {path: demo:teacher, dtype: bfloat16}}", "data.teacher_column=of"]
    with pytest.raises(ConfigError) as refused:
        load_config("demo", [*named, f"{section}.backend=vllm"])
    assert f"{section}.backend = 'vllm': needs a GPU, and {section}.num_gpus = 0" in str(refused.value)
    load_config("demo", [*named, f"{section}.backend=vllm", f"{section}.num_gpus=0.5"])
    load_config("demo", ["scorer.backend=vllm", *ALONE])  # nobody asks it
