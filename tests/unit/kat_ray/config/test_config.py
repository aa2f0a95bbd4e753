"""Configuration files and overrides: what is read, what is refused, and in which words."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kat_ray.config import Config, schema
from kat_ray.config.load import DEMO_FILES, config_yaml, load_config, resolve_path, save_config
from kat_ray.config.local_paths import ADVICE, RUN_ADVICE
from kat_ray.errors import ConfigError
from tests.support.paths import ROOT

MINIMAL = """\
student: {path: a}
teacher: {path: b}
data: {path: c.jsonl}
"""


@pytest.fixture
def write(tmp_path):
    def _write(text, extra=MINIMAL):
        path = tmp_path / "config.yaml"
        path.write_bytes(
            (extra.encode() if isinstance(text, str) else b"") + (text.encode() if isinstance(text, str) else text)
        )
        return path

    return _write


def refusal(path, overrides=()):
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value).replace(str(path), "F")


def test_minimal_file_takes_the_defaults(write):
    config = load_config(write(""))
    assert config == Config.model_validate(
        {"student": {"path": "a"}, "teacher": {"path": "b"}, "data": {"path": "c.jsonl"}}
    )
    assert config.termination.rule == "kat"
    assert config.learner.lr == 1e-6


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("learner.lr=1e-4", "learner", "lr", 1e-4),  # YAML 1.1 reads text
        ("learner.lr=1E+2", "learner", "lr", 100.0),
        ("learner.lr=.5", "learner", "lr", 0.5),
        ("learner.betas=[0.8, 0.9]", "learner", "betas", (0.8, 0.9)),
        ("evaluation.max_tokens=null", "evaluation", "max_tokens", None),
        ("evaluation.max_tokens=~", "evaluation", "max_tokens", None),
        ("run.name=no", "run", "name", "no"),  # YAML 1.1 reads false
        ("run.name=2026-01-02", "run", "name", "2026-01-02"),  # YAML 1.1 reads a date
        ("data.path=a=b.jsonl", "data", "path", "a=b.jsonl"),
        (" run.steps = 7 ", "run", "steps", 7),
        ("evaluation.grading_seconds=2", "evaluation", "grading_seconds", 2.0),
        ("run.tensorboard=false", "run", "tensorboard", False),
        ("tracking=[wandb, mlflow]", "tracking", "to", ("wandb", "mlflow")),
        ("tracking.to=[]", "tracking", "to", ()),
    ],
)
def test_override_values_are_read_as_yaml(write, override, section, field, value):
    assert getattr(getattr(load_config(write(""), [override]), section), field) == value


def test_trackers_are_a_list_or_a_section(write):
    file = write("tracking: [wandb, tensorboard]")
    assert load_config(file).trackers == ("wandb", "tensorboard")
    config = load_config(file, ["tracking.online=true", "run.tensorboard=false"])
    assert config.tracking.online and config.trackers == ("wandb",), "older configurations say it this way"
    assert load_config(write("")).trackers == ("tensorboard",)
    assert load_config(write(""), ["run.tensorboard=false"]).trackers == ()
    with pytest.raises(ConfigError, match=r'tracking\.to = "wandbb": must be a list of one of tensorboard, wandb,'):
        load_config(write("tracking: [wandbb]"))
    with pytest.raises(ConfigError, match=r"tracking\.to: wandb is named twice"):
        load_config(write("tracking: [wandb, wandb]"))
    with pytest.raises(ConfigError, match="tracking"):
        load_config(write("tracking: 3"))


def test_arguments_of_the_chat_template_are_given_as_a_mapping_or_one_by_one(write):
    for overrides in (["{enable_thinking: false, n: 1}"], [".enable_thinking=false", ".n=1"]):
        given = [f"data.chat_template_kwargs{o if o[0] == '.' else f'={o}'}" for o in overrides]
        data = load_config(write(""), ["data.chat_template=teacher", *given]).data
        assert (data.chat_template, data.chat_template_kwargs) == ("teacher", {"enable_thinking": False, "n": 1})


def test_later_overrides_win_and_sections_can_be_made(write):
    config = load_config(
        write("evaluation:\n  data: null\n"), ["run.steps=1", "run.steps=2", "evaluation.data.path=x.jsonl"]
    )
    assert (config.run.steps, config.evaluation.data.path) == (2, "x.jsonl")


def test_empty_section_means_defaults(write):
    assert load_config(write("sampler:\n")).sampler.replicas == 1


def test_aliases_and_merges_work_and_overrides_touch_one_use_only(write):
    text = "sampler: &s {num_cpus: 2}\nscorer: {<<: *s, replicas: 3}\nlearner: *s\n"
    config = load_config(write(text), ["learner.num_cpus=5"])
    assert (config.sampler.num_cpus, config.scorer.num_cpus, config.learner.num_cpus) == (2, 2, 5)


def test_another_rule_drops_the_files_termination_fields(write):
    path = write("termination: {rule: kat, eta: 0.1, window: 8}\n")
    assert load_config(path, ["termination.rule=none"]).termination.rule == "none"
    assert load_config(path, ["termination.rule=kat"]).termination.eta == 0.1
    assert load_config(path, ["termination.eta=0.2"]).termination.window == 8


@pytest.mark.parametrize(
    ("given", "budget", "waits"),
    [
        ("", 0.03, (256, 128, 2)),
        ("budget: 0.05", 0.05, (256, 128, 2)),
        ("budget: null", None, (4096, 512, 50)),
        ("eta: 0.1", None, (4096, 512, 50)),
        ("calibrate_on: all", None, (4096, 512, 50)),
        ("eta: 0.1, budget: 0.05", 0.05, (256, 128, 2)),
        ("eta: 0.1, buffer: 600", None, (600, 512, 50)),
    ],
)
def test_what_sets_the_threshold_decides_how_long_the_rule_waits(write, given, budget, waits):
    rule = load_config(write(f"termination: {{rule: kat, {given}}}\n")).termination
    assert (rule.budget, (rule.buffer, rule.min_samples, rule.min_steps)) == (budget, waits)
    assert type(rule).model_validate(rule.model_dump()) == rule, "as its record is read"


def test_overridden_termination_fields_belong_to_the_new_rule(write):
    path = write("termination: {rule: none}\n")
    config = load_config(path, ["termination.window=8", "termination.rule=kat"])
    assert (config.termination.rule, config.termination.window) == ("kat", 8)
    assert "F" not in (text := refusal(path, ["termination.rule=none", "termination.eta=0.2"]))
    assert text.endswith("termination.eta: unknown field of rule none; it belongs to rule kat and kat_stages")


def test_termination_without_rule_takes_the_default_rule(write):
    assert load_config(write("termination: {eta: 0.1}\n")).termination.rule == "kat"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("termination: {eta: 1.0}\n", "F:4: termination.eta = 1.0: must be a number > 0 and < 1"),
        ("termination: {eta: 0}\n", "F:4: termination.eta = 0: must be a number > 0 and < 1"),
        ("run:\n  seed: 1\n  steps: 1.5\n", "F:6: run.steps = 1.5: must be a whole number >= 1"),
        ("run: {steps: true}\n", "F:4: run.steps = true: must be a whole number >= 1"),
        ("rollout: {top_p: .nan}\n", "F:4: rollout.top_p = NaN: must be a number > 0 and <= 1"),
        (
            "rollout: {eos: mergd}\n",
            'F:4: rollout.eos = "mergd": must be one of raw, merged, mask; did you mean merged?',
        ),
        (
            "evaluation: {data: {path: x, chat_template: 3}}\n",
            "F:4: evaluation.data.chat_template = 3: must be true or false or text that is not empty",
        ),
        (
            "evaluation: {data: {path: x, chat_template_kwargs: {a: [1]}}}\n",
            "F:4: evaluation.data.chat_template_kwargs.a = [1]: must be true or false or a whole number or "
            "a number or text or null",
        ),
        ("learner: {betas: [0.9, 2]}\n", "F:4: learner.betas[1] = 2: must be a number >= 0 and < 1"),
        (
            "run: {name: 7}\n",
            "F:4: run.name = 7: must be text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$; put it in quotes",
        ),
        ("run: {name: latest}\n", "F:4: run.name = 'latest': this name is reserved for the link to the newest run"),
        (
            "run: {dir: ftp://b/runs}\n",
            f'F:4: run.dir = "ftp://b/runs": {RUN_ADVICE}',
        ),
        (
            "evaluation: {data: {path: gs://b/p.jsonl}}\n",
            f'F:4: evaluation.data.path = "gs://b/p.jsonl": {ADVICE}',
        ),
        ("run: {stpes: 3}\n", "F:4: run.stpes: unknown field; did you mean steps?"),
        ("run: {max_num_seqs: 3}\n", "F:4: run.max_num_seqs: unknown field; did you mean sampler.max_num_seqs?"),
        ("sampelr: {}\n", "F:4: sampelr: unknown field; did you mean sampler?"),
        ("run: 3\n", "F:4: run = 3: must be a section with fields"),
        ("1: 2\n", "F: [1]: the name of a field must be text"),
        (
            "termination: {rule: kta}\n",
            'F:4: termination.rule = "kta": must be one of none, kat; did you mean kat?',
        ),
        ("run: {steps: 1}\nrun: {seed: 2}\n", "F:5: run is given twice, first in line 4"),
        ("run:\n  steps: 1\n  steps: 2\n", "F:6: run.steps is given twice, first in line 5"),
    ],
)
def test_mistakes_name_line_field_value_and_what_is_allowed(write, text, message):
    found = refusal(write(text))
    if "one of none, kat" in message:  # other rules may join them
        message, found = message.replace("none, kat", ""), found.replace(", ".join(schema.rules()), "")
    assert found == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("termination: {min_samples: 9, buffer: 8}\n", "termination.min_samples = 9: must be <= buffer = 8"),
        ("termination: {probe_share: 0}\n", "termination.probe_share = 0: must be > 0 with calibrate_on = probes"),
        ("learner: {world_size: 3}\nrollout: {prompts_per_step: 2}\n", "learner.world_size = 3: must be <= 2"),
        (
            "sampler: {max_num_seqs: 65, max_num_batched_tokens: 64}\n",
            "sampler.max_num_batched_tokens = 64: must be >= max_num_seqs = 65",
        ),
        (
            "evaluation: {data: {path: x, chat_template_kwargs: {a: 1}}}\n",
            "chat_template_kwargs: needs chat_template",
        ),
        (
            "evaluation: {data: {path: x, chat_template: true, chat_template_kwargs: {tokenize: 1}}}\n",
            "evaluation.data.chat_template_kwargs.tokenize: is set by the run itself",
        ),
        ("evaluation: {data: {path: x, answer_column: null}}\n", "evaluation.data.answer_column = null"),
        (
            "objective: {opd: {weight: 0}}\n",
            "objective.opd.weight = 0 and rl.weight = 0: there is nothing to optimise",
        ),
        (
            "objective: {rl: {weight: 1}}\nrollout: {top_p: 1}\n",
            "objective.rl.weight = 1: needs rollout.rollouts_per_prompt >= 2 (it is 1)",
        ),
        (
            "objective: {rl: {weight: 1}}\nrollout: {rollouts_per_prompt: 4}\n",
            "objective.rl.weight = 1: needs rollout.top_p = 1 (it is 0.95)",
        ),
        (
            "objective: {rl: {weight: 1}}\nrollout: {rollouts_per_prompt: 4, top_p: 1, temperature: 0.7}\n",
            "objective.rl.weight = 1: needs rollout.temperature = 1 (it is 0.7)",
        ),
        (
            "objective: {rl: {weight: 1, loss: reinforce}}\n"
            "rollout: {rollouts_per_prompt: 4, top_p: 1, staleness: 1}\n",
            "objective.rl.weight = 1: needs a ratio of learner to sampler with rollout.staleness = 1",
        ),
        (
            "objective: {rl: {weight: 1, correction: truncate}}\n",
            "objective.rl.correction = 'truncate': counts the ratio of learner to sampler twice",
        ),
        (
            "objective: {rl: {weight: 1, loss: gspo, aggregate: token_mean}}\n",
            "objective.rl.aggregate = 'token_mean': must be 'sequence_mean' with loss = 'gspo'",
        ),
        (
            "objective: {rl: {weight: 1, loss: gspo, correction: sequence_mask}}\n",
            "objective.rl.correction = 'sequence_mask': counts the ratio of learner to sampler twice",
        ),
        (
            "objective: {opd: {final_weight: 0.1}}\n",
            "objective.opd.final_weight = 0.1 and anneal_steps = null: set both, or neither",
        ),
        (
            "objective: {rl: {final_weight: 0.1, anneal_steps: 5}}\n",
            "objective.rl.weight = 0: leaves this loss out of the run, and cannot go to final_weight = 0.1",
        ),
        (
            "objective: {opd: {final_weight: 0, anneal_steps: 5}}\n",
            "objective.opd's weight and rl's are both 0 after 5 steps",
        ),
        (
            "objective: {rl: {weight: 1, overlong: {buffer: 9}}}\n"
            "rollout: {rollouts_per_prompt: 4, top_p: 1, max_tokens: 8}\n",
            "objective.rl.overlong.buffer = 9: must be <= rollout.max_tokens = 8",
        ),
        (
            "objective: {rl: {probe_min: 9, probe_buffer: 8}}\n",
            "objective.rl.probe_min = 9: must be <= probe_buffer = 8",
        ),
        (
            "objective: {rl: {weight: 1, correction_range: [2, 1]}}\n",
            "objective.rl.correction_range = [2, 1]: must be two rising numbers",
        ),
        (
            "evaluation: {data: {path: x, system_prompt: hi}}\n",
            "evaluation.data.system_prompt: needs chat_template",
        ),
    ],
)
def test_fields_that_contradict_each_other(write, text, message):
    assert message in refusal(write(text))


def test_several_mistakes_one_line_each(write):
    lines = refusal(write("run: {steps: 0, nme: x}\n"), ["learner.lr=-1"]).splitlines()
    assert sorted(lines) == [
        "F:4: run.nme: unknown field; did you mean name?",
        "F:4: run.steps = 0: must be a whole number >= 1",
        "override learner.lr=-1: learner.lr = -1: must be a number > 0",
    ]


def test_missing_sections_are_named(write):
    assert refusal(write("data: {path: c}\n", extra="")).splitlines() == [
        "F: student is missing: a section with fields",
    ]


ALONE = ["teacher=null", "objective.opd.weight=0", "objective.rl.weight=1", "rollout.rollouts_per_prompt=4",
         "rollout.top_p=1", "termination.rule=none"]  # fmt: skip


def test_rewards_alone_need_no_teacher_and_read_none(write):
    config = load_config(write(""), ALONE)
    assert (config.teacher, config.used_teachers, config.compared_tokens) == (None, {}, 0)
    again = load_config(write(""), ALONE[1:])
    assert again.teacher is not None and not again.used_teachers, "one that is named is not read"


@pytest.mark.parametrize(
    ("changes", "who"),
    [
        (["objective.opd.weight=0.3"], "objective.opd.weight = 0.3 needs one"),
        (["termination.rule=kat"], "termination.rule = 'kat' needs one"),
        (["termination.rule=random", "objective.opd.weight=1"],
         "objective.opd.weight = 1 and termination.rule = 'random' need one"),
    ],
)  # fmt: skip
def test_who_needs_a_teacher_is_named_where_it_is_missing(write, changes, who):
    (line,) = refusal(write(""), [*ALONE, *changes]).splitlines()
    assert line == (
        f"F: teacher is missing: {who}; name it with teacher.path. Rewards alone need none: objective.opd.weight = "
        "0 with termination.rule = none"
    )
    assert load_config(write(""), [*ALONE[1:], *changes]).used_teachers


@pytest.mark.parametrize("section", ["data", "evaluation.data"])
def test_no_template_is_taken_from_a_teacher_that_is_not_read(write, section):
    changes = [*ALONE[1:], f"{section}.path=x.jsonl", f"{section}.chat_template=teacher"]
    assert f"{section}.chat_template = 'teacher': no teacher is read" in refusal(write(""), changes)


def test_a_configuration_without_a_teacher_is_written_and_read_again(write, tmp_path):
    config = load_config(write(""), ALONE)
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


# Forty lines that stand for 2^40 values.
DOUBLED = b"a0: &a0 {x: 1}\n" + b"".join(
    b"a%d: &a%d {x: *a%d, y: *a%d}\n" % (i, i, i - 1, i - 1) for i in range(1, 40)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "F: the file is empty"),
        (b"# only a comment\n", "F: the file is empty"),
        (b"- 1\n", "F: a configuration is a mapping of sections, this is [1]"),
        (b"run: {steps: 1\nx", "F:2:2: not valid YAML"),
        (b"run:\n\tsteps: 1\n", "F:2:1: not valid YAML"),
        (b"a: \x00", "F: not valid YAML"),
        (b"a: \xff", "F: cannot be read: is not UTF-8 text"),
        (b"a: &x {b: *x}", "F:1:4: not valid YAML: an alias contains itself"),
        (b"a: !!python/name:os.system x", "F:1:4: not valid YAML: the tag tag:yaml.org,2002:python/name:os.system"),
        (b"a: !!int x", "F:1:4: not valid YAML: the tag tag:yaml.org,2002:int does not fit 'x'"),
        (b"a: !!binary AAAA", "F:1:4: not valid YAML: the tag tag:yaml.org,2002:binary does not fit 'AAAA'"),
        (b"a: " + b"9" * 5000, "F:1:4: not valid YAML: a number of 5000 digits"),
        (b"a: " + b"[" * 100_000, "F: not valid YAML: nested too deeply"),
        (
            DOUBLED,
            "F:16:6: not valid YAML: its aliases stand for more than 100,000 values",
        ),
        (b'student: {path: "a\\0b"}', 'F:1: student.path = "a\\u0000b": holds a NUL'),
        (b'student: {path: "\\ud800"}', 'F:1: student.path = "\\ud800": holds a NUL or half a character'),
        (b"cluster: {address: 'ray://me:word@host'}", "F:1: cluster.address holds a secret"),
    ],
)
def test_files_that_cannot_be_read(write, content, message):
    assert refusal(write(content)).startswith(message)


def test_missing_and_unreadable_files(tmp_path):
    assert refusal(tmp_path / "no.yaml") == (
        "F: no such file; embedded configurations: `demo`, `demo-rl`, `demo-long`, `demo-hints`"
    )
    assert refusal(tmp_path) == "F: cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps", "override 'run.steps': write it as section.field=value"),
        ("=3", "override '=3': write it as"),
        ("run..steps=3", "override 'run..steps=3': write it as"),
        ("student.path.x=3", 'override student.path.x=3: student.path is "a", it has no fields'),
        ("run.steps=[1", "override run.steps=[1: the value is not valid YAML"),
        ("run={steps: 1, steps: 2}", "override run={steps: 1, steps: 2}:1: steps is given twice"),
        ("run.stpes=3", "override run.stpes=3: run.stpes: unknown field; did you mean steps?"),
        ("run.steps=", "override run.steps=: run.steps = null: must be a whole number"),
    ],
)
def test_overrides_that_cannot_be_read(write, override, message):
    assert refusal(write(""), [override]).startswith(message)


def test_saved_configuration_loads_back_equal(write, tmp_path):
    config = load_config(write(""), ["learner.lr=1e-4", "run.name='007'", "evaluation.data.path=ü.jsonl"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@settings(deadline=None, max_examples=40)
@example(lr=1e-6, name="1e5", path="1e100")
@example(lr=1.0, name="0x1F", path="null")
@example(lr=1.0, name="0", path="a\x85b\u2028")
@given(
    lr=st.floats(min_value=1e-300, max_value=1e300),
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,12}\Z").filter(lambda n: n != "latest"),
    path=st.text(
        min_size=1, max_size=12, alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    ),
)
def test_any_value_survives_saving(tmp_path_factory, lr, name, path):
    config = Config.model_validate(
        {
            "student": {"path": path},
            "teacher": {"path": "b"},
            "data": {"path": "c"},
            "learner": {"lr": lr},
            "run": {"name": name},
        }
    )
    file = tmp_path_factory.mktemp("saved") / "c.yaml"
    file.write_text(config_yaml(config), encoding="utf-8", newline="")
    assert load_config(file) == config


def test_demo_names(write):
    assert resolve_path("demo:student") == DEMO_FILES["demo:student"]
    assert resolve_path("some/where") == Path("some/where")
    with pytest.raises(
        ConfigError,
        match=r"demo:studnt.*there are demo:student, demo:teacher, demo:train, demo:heldout, demo:long-",
    ):
        resolve_path("demo:studnt")


def test_configuration_page_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == schema.configuration_markdown(), "run: kat-ray config --docs > docs/configuration.md"


def test_every_field_is_documented():
    for name, definition in schema.root_schema()["$defs"].items():
        for field, properties in definition["properties"].items():
            assert "description" in properties or "const" in properties, f"{name}.{field}"


@pytest.mark.parametrize("address", ["s3://my-bucket", "s3://my-bucket/a/b/", "gs://b/runs", "az://container/runs"])
def test_a_run_may_be_in_a_bucket(address):
    assert load_config("demo", [f"run.dir={address}"]).run.dir == address


@pytest.mark.parametrize("address", ["s3://", "s3:///runs", "S3://b/x", "s3://b/a?x=1", "hdfs://b/x", "s3://b//x"])
def test_other_addresses_of_runs_are_refused_with_what_is_allowed(address):
    with pytest.raises(ConfigError, match="must be a folder, or an address of s3://BUCKET/FOLDER, gs://"):
        load_config("demo", [f"run.dir={address}"])


@pytest.mark.parametrize("field", ["student.path", "teacher.path", "data.path", "evaluation.data.path"])
def test_object_stores_are_refused_with_what_to_do(field):
    """`Path` would make a local folder `s3:` of it; a hub would be asked for it."""
    with pytest.raises(ConfigError, match=rf'{field} = "s3://bucket/x": .*mount it as a file system on all nodes'):
        load_config("demo", [f"{field}=s3://bucket/x"])


@pytest.mark.parametrize(
    "scorer, engine, block",
    [("{}", "transformers", 1), ("{num_gpus: 1}", "vllm", 16), ("{backend: vllm, num_gpus: 0.5}", "vllm", 16),
     ("{num_gpus: 2, tensor_parallel_size: 2, cache_block: 64}", "vllm", 64),
     ("{num_gpus: 1, backend: transformers}", "transformers", 1)],
)  # fmt: skip
def test_the_teachers_engine_follows_from_its_gpus(write, scorer, engine, block):
    config = load_config(write(f"scorer: {scorer}\n")).scorer
    assert (config.engine, config.chunk_block) == (engine, block)


def test_a_rule_that_needs_what_vllm_does_not_report_is_refused_by_name(write, monkeypatch):
    from kat_ray.termination import prune_opd, registry

    rule = "termination: {rule: prune_opd}\nscorer: {num_gpus: 1}\n"
    assert load_config(write(rule)).termination.rule == "prune_opd"  # it needs overlap, which vLLM is asked for
    monkeypatch.setitem(registry._OWN, "prune_opd", replace(prune_opd.KIND, needs=("teacher_entropy",)))
    assert "termination.rule = 'prune_opd': it needs teacher_entropy of every token" in refusal(write(rule))
    assert load_config(write(rule), ["scorer.backend=transformers"]).scorer.engine == "transformers"


EXAMPLES = {
    f"{page}-{i}": block
    for page in ("teachers", "lora")
    for i, block in enumerate(re.findall(r"```yaml\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.S))
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_whole_configurations_of_the_documentation_are_such(write, name):
    assert len(EXAMPLES) >= 4
    assert load_config(write(EXAMPLES[name], extra="")).student.path == "org/student"
