"""One set of stop ids: what the KL compares as one event ends a rollout in vLLM, and stands in the checkpoint."""

import json

import pytest

from actors.driver.preparation import prepare
from kat_ray.types.records import EngineEnd, SamplingSettings
from tests.cluster.ranks import Group
from tests.support.configs import make_config
from tests.support.models import write_job_files

pytestmark = pytest.mark.integration

OWN, OTHER = (1,), (5, 9)  # the student's stop ids and the teacher's


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The driver's view of a student and a teacher that end their texts on different ids."""
    root = write_job_files(tmp_path_factory.mktemp("files"))
    for name, ids in (("student", OWN), ("teacher", OTHER)):
        (root / name / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ids)}))
    config = make_config(
        str(root / "student"),
        str(root / "teacher"),
        data={"path": str(root / "prompts.jsonl")},
        rollout={"max_tokens": 40, "top_k_logprobs": 8},
        sampler={"kv_cache_gib": 0.1},
    )
    return config, prepare(config)


def test_every_id_of_the_stop_event_ends_a_rollout(prepared):
    from actors.sampler.vllm_engine import VllmEngine

    config, given = prepared
    ids = set(given.facts.stop_ids)  # what scorers and learner compare
    assert ids == {*OWN, *OTHER} and set(given.paths.student_stop_ids) == ids
    engine = VllmEngine(config.student, config.sampler, given.paths.student_dir, max_model_len=80, top_k=8, seed=0)
    settings = SamplingSettings(
        max_tokens=40, temperature=2.0, top_p=1.0, logprobs=0, stop_ids=given.paths.student_stop_ids
    )
    tokens, ends = {}, {}
    for i in range(120):
        engine.add(str(i), [20, 30 + i], i, settings)
    while engine.running:
        for rows in engine.step():
            tokens.setdefault(rows.request_id, []).extend(rows.token_ids)
            ends[rows.request_id] = rows.end
    engine.close()
    for name, answer in tokens.items():
        assert not ids & set(answer[:-1]), "nothing is generated behind a stop id"
        if len(answer) < settings.max_tokens:
            assert ends[name] is EngineEnd.EOS and answer[-1] in ids
    assert {answer[-1] for answer in tokens.values()} >= ids, "each of them has ended a rollout"


def test_a_checkpoint_generates_to_the_same_ids(prepared, models, tmp_path):
    _, given = prepared
    assert given.paths.teacher_stop_ids == {"default": OTHER}
    with Group(models, 1, stop_ids=given.facts.stop_ids) as group:
        group.save(tmp_path / "out", given.paths.student_dir)
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == sorted({*OWN, *OTHER})
