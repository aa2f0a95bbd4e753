"""What a configuration says of a teacher behind HTTP, and what of it is refused."""

import pytest
import yaml

from kat_ray.config.load import config_yaml, load_config
from kat_ray.errors import ConfigError
from kat_ray.models.support import roles_of
from kat_ray.run.resume import changes, resumable

HTTP = ("teacher.type=http", "teacher.url=http://127.0.0.1:9")


def test_defaults_are_a_local_teacher():
    config = load_config("demo")
    (group,) = config.scorer_groups
    assert config.teacher.type == "local" and not config.teacher.urls and group.engine == "transformers"


def test_it_runs_no_model_here():
    config = load_config("demo", HTTP)
    (group,) = config.scorer_groups
    assert group.engine == "http" and group.chunk_block == 1 and roles_of(config)["teacher"] == ()


def test_addresses_are_one_or_several():
    several = load_config("demo", [HTTP[0], "teacher.url=[http://a:1/, 'https://b']"])
    assert several.teacher.urls == ("http://a:1", "https://b")
    assert load_config("demo", HTTP).teacher.urls == ("http://127.0.0.1:9",)


def test_names_of_one_checkpoint_at_two_servers_are_two_groups():
    tree = {"path": "demo:teacher", "type": "http"}
    named = {
        "a": tree | {"url": "http://a:1"},
        "b": tree | {"url": "http://b:1"},
        "c": tree | {"url": "http://a:1"},
    }
    config = load_config("demo", ["teacher=null", f"teachers={named}", "data.teacher_column=of"])
    assert [g.teachers for g in config.scorer_groups] == [("a", "c"), ("b",)]
    named["c"]["http"] = {"concurrency": 3}
    with pytest.raises(ConfigError, match=r"teachers\.c\.http: asks the server of teachers\.a in another way"):
        load_config("demo", ["teacher=null", f"teachers={named}", "data.teacher_column=of"])


def test_a_resume_may_move_the_server_and_nothing_else():
    before = load_config("demo", HTTP)
    moved = load_config("demo", [HTTP[0], "teacher.url=[http://b:2]", "teacher.http.concurrency=4"])
    assert changes(before, moved) == []
    assert changes(before, load_config("demo")) == ["teacher.type"]


def test_a_run_made_before_there_was_one_is_resumed(tmp_path):
    tree = yaml.safe_load(config_yaml(load_config("demo")))
    for field in ("type", "url", "http"):
        del tree["teacher"][field]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert changes(load_config(tmp_path / "config.yaml"), load_config("demo")) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.type=http"], "teacher.type = 'http': needs url"),
        (["teacher.url=http://a:1"], "teacher.url = 'http://a:1': is of a teacher with type = 'http'"),
        ([HTTP[0], "teacher.url=ftp://a"], "teacher.url = 'ftp://a': must be the address of a server"),
        ([HTTP[0], "teacher.url=a:8000"], "must be the address"),
        ([HTTP[0], "teacher.url='http://a:99999'"], "must be the address"),
        ([HTTP[0], "teacher.url='http://a:1/v1?x=1'"], "must be the address"),
        ([HTTP[0], "teacher.url=[]"], "teacher.url"),
        ([HTTP[0], "teacher.url='http://user:word@a:1'"], "holds a secret"),
        ([*HTTP, "scorer.num_gpus=1"], "scorer.num_gpus = 1: teacher.type = 'http', whose scorers run no model"),
        ([*HTTP, "scorer.backend=vllm"], "scorer.backend = 'vllm': teacher.type = 'http'"),
        ([*HTTP, "teacher.http.retry_seconds=300"], "teacher.http.retry_seconds = 300: must be < 300"),
        ([*HTTP, "teacher.http.token_env=A", "teacher.http.token_file=b"], "give one of them"),
        ([*HTTP, "teacher.weights=average"], "weights = 'average': needs type = 'local'"),
        ([*HTTP, "teacher.http.concurrency=0"], "teacher.http.concurrency = 0: must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_field(overrides, words):
    with pytest.raises(ConfigError) as refused:
        load_config("demo", overrides)
    assert words in str(refused.value)


def test_a_server_may_be_asked_for_what_scorers_give():
    """What it cannot give it says itself, before a run."""
    opd = ["objective.opd.teacher_temperature=2", "objective.opd.support=teacher"]
    given = ["objective.off_policy.share=0.25", "data.completion_column=solution"]
    assert load_config("demo", [*HTTP, *opd, *given]).objective.opd.teacher_temperature == 2


def test_a_token_in_the_place_of_a_name_is_not_shown():
    with pytest.raises(ConfigError, match="name of an environment variable") as refused:
        load_config("demo", [*HTTP, "teacher.http.token_env=hush-hush-5309"])
    assert "hush" not in str(refused.value)


def test_what_is_marked_is_free_in_sections_that_may_be_left_out():
    """`environment` and `teacher` may be; what they mark was refused all the same."""
    found = set(resumable())
    assert {"teacher.url", "teacher.http", "teachers.*.url", "environment.seconds"} <= found
    assert not {"teacher", "teacher.path", "environment", "environment.seed"} & found
