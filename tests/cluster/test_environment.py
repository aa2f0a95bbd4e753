"""Problems that are made, asked of a real model through the whole pipeline, and made again when the run goes on."""

import json

import pytest

from actors.driver import train as job
from actors.driver.preparation import prepare
from kat_ray.config import Config
from kat_ray.config.load import load_config
from kat_ray.records.traces import read_traces
from kat_ray.rewards.extraction import extract_answer
from kat_ray.run.resume import resumed_config
from tests.support.paths import ROOT
from tests.support.real_models import NotToBeHad, write_pair

pytestmark = pytest.mark.nightly

RECIPE = ROOT / "docs/recipes/reasoning-gym.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    try:
        return write_pair(tmp_path_factory.mktemp("smollm2"), 0.1) / "teacher"
    except NotToBeHad as error:
        pytest.skip(f"SmolLM2-135M cannot be had: {error}")


def test_the_recipe_for_three_steps(ray_local, model, tmp_path):
    changes = [
        f"run.dir={tmp_path}", "run.steps=2", "run.tensorboard=false", f"student.path={model}",
        "rollout.prompts_per_step=4", "rollout.rollouts_per_prompt=4", "environment.heldout=4", "evaluation.k=2",
        "evaluation.every=0", "sampler.kv_cache_gib=0.25", "evaluation.grading_processes=1",
    ]  # fmt: skip
    config: Config = load_config(RECIPE, changes)
    path = job.train(config)
    path = job.train(resumed_config(path, ["run.steps=3"]), resume=path)
    steps = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "learner/loss" in step]
    assert len(steps) == 3 and all(0 <= step["reward/mean"] <= 1 and step["time/grade"] > 0 for step in steps)
    evaluations = [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]
    assert evaluations and all(len(e["right"]) == 4 for e in evaluations)

    prepared = prepare(config)
    prompts = {p.prompt_id: p for p in prepared.train.prompts}
    rows = read_traces(path).to_pylist()
    assert len(rows) == 48 and all(row["correct"] == (row["reward"] == 1) for row in rows)
    for row in rows:  # families of numbers: an answer that is the gold answer itself is right
        answer = extract_answer(
            prepared.facts.tokenizer.decode(row["token_ids"], skip_special_tokens=True), "first_line"
        )
        assert row["reward"] == 1 or answer != prompts[row["prompt_id"]].answer
