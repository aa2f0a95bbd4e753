"""Each recipe of docs/recipes for two steps on real engines, with tiny models of the same architecture.

The very file is loaded. What is overridden is named here: what stands in for models and data, sizes that two cores
can bear, and GPUs.
"""

import json

import pytest

from actors.driver.train import train
from kat_ray.config.load import load_config
from kat_ray.records.traces import read_traces
from tests.support.recipes import FOLDER, RECIPES, stand_ins

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("ray_local")]

SIZES = {  # of what a step has
    "run.steps": 2, "run.checkpoint_every": 2, "run.tensorboard": False, "rollout.max_tokens": 40,
    "rollout.prompts_per_step": 4, "evaluation.k": 1, "evaluation.every": 0, "evaluation.every_k": "null",
    "evaluation.grading_processes": 1, "sampler.kv_cache_gib": 0.1, "sampler.max_num_seqs": 16,
}  # fmt: skip
ONE_CPU = {
    "student.dtype": "float32", "learner.dtype": "float32", "learner.num_gpus": 0, "sampler.num_gpus": 0,
    "scorer.num_gpus": 0, "learner.world_size": 1, "sampler.replicas": 1, "scorer.replicas": 1,
    "learner.num_cpus": 0.5, "sampler.num_cpus": 0.5, "scorer.num_cpus": 0.5, "learner.threads": 1,
}  # fmt: skip
TEACHER = {"teacher.dtype": "float32"}
OWN = {  # what else a recipe needs to have few tokens
    "dapo": {
        "objective.rl.overlong.buffer": 8, "rollout.rollouts_per_prompt": 4, "objective.rl.max_num_gen_batches": 2,
    },
    "opd-rl": {"rollout.rollouts_per_prompt": 4},
}  # fmt: skip
# The environment's recipe runs with a real model: test_environment.
TRIED = [path for path in RECIPES if path.stem != "reasoning-gym"]


def test_what_is_overridden_is_of_sizes_and_places():
    fields = {*SIZES, *ONE_CPU, *TEACHER, *(field for own in OWN.values() for field in own)}
    kept = ("objective.opd", "objective.rl.loss", "objective.rl.clip", "termination", "learner.lr", "learner.lora")
    assert not [field for field in fields if field.startswith(kept)]


@pytest.mark.parametrize("recipe", TRIED, ids=lambda path: path.stem)
def test_two_steps(recipe, tmp_path):
    plain = load_config(recipe)
    changes = SIZES | ONE_CPU | (TEACHER if plain.teacher else {}) | OWN.get(recipe.stem, {})
    if plain.evaluation.data is None:
        changes = {field: value for field, value in changes.items() if not field.startswith("evaluation.")}
    sets = [f"evaluation.sets.{name}.k=1" for name in plain.evaluation.sets]
    overrides = [*stand_ins(plain, tmp_path, tiny=True), *(f"{k}={v}" for k, v in changes.items()), *sets]
    config = load_config(recipe, [*overrides, f"run.dir={tmp_path / 'runs'}"])
    assert config.termination == plain.termination and config.reward == plain.reward
    assert config.objective.opd == plain.objective.opd and config.learner.lora == plain.learner.lora
    path = train(config)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "learner/loss" in line]
    assert len(steps) == 2 and all(abs(step["learner/loss"]) < 100 for step in steps)
    rows = read_traces(path).to_pylist()
    assert len(rows) >= 2 * config.rollout.rollouts_per_step and all(row["token_ids"] for row in rows)
    if config.objective.rl.weight:
        assert all(row["reward"] is not None for row in rows)
    if config.used_teachers:
        assert all(step["kl/mean"] > 0 for step in steps)
    if config.evaluation.data is not None:
        found = [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]
        assert found and all([*(e.get("sets") or {})] == [*config.evaluation.sets] for e in found)
    assert (path / "summary.json").exists() and FOLDER in recipe.parents
