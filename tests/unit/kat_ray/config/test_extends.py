"""A configuration that extends another: what counts, from which folder, and what messages name."""

import pytest

from kat_ray.config.load import EMBEDDED, config_files, config_yaml, load_config
from kat_ray.errors import ConfigError

BASE = """\
student: {path: a}
teacher: {path: b, dtype: float32}
data: {path: c.jsonl, rename: {question: prompt}}
rollout: {max_tokens: 64, top_p: 0.9}
termination: {rule: kat, window: 8, eta: 0.2}
learner: {betas: [0.8, 0.9], lora: {rank: 4}}
tracking: {project: mine}
"""


@pytest.fixture
def tree(tmp_path):
    def write(**files):
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def loaded(folder, text, overrides=()):
    (folder / "top.yaml").write_text(text)
    return load_config(folder / "top.yaml", overrides)


def refusal(folder, text):
    with pytest.raises(ConfigError) as error:
        loaded(folder, text)
    return str(error.value).replace(f"{folder}/", "")


def test_a_file_stands_before_its_base_field_by_field(tree):
    folder = tree(base=BASE)
    alone = load_config(folder / "base.yaml")
    assert loaded(folder, "extends: base.yaml\n") == alone
    assert loaded(folder, "extends: base.yaml\nrollout:\nteacher:\n") == alone, "an empty section says nothing"
    config = loaded(
        folder,
        "extends: base.yaml\nrollout: {max_tokens: 32}\ndata: {rename: {gold: answer}}\n"
        "learner: {betas: [0.7, 0.99], lora: null}\ntracking: [wandb]\ntermination: {window: 4}\n",
        ["rollout.top_p=0.5"],
    )
    assert (config.rollout.max_tokens, config.rollout.top_p, config.teacher.dtype) == (32, 0.5, "float32")
    assert config.data.rename == {"question": "prompt", "gold": "answer"}
    assert config.learner.betas == (0.7, 0.99) and config.learner.lora is None
    assert (config.tracking.project, config.tracking.to) == ("mine", ("wandb",))
    assert (config.termination.window, config.termination.eta) == (4, 0.2)
    (folder / "run.yaml").write_text(config_yaml(config))
    assert load_config(folder / "run.yaml") == config, "a run's own file is whole"


def test_another_rule_takes_nothing_from_the_bases(tree):
    folder = tree(base=BASE)
    assert loaded(folder, "extends: base.yaml\ntermination: {rule: none}\n").termination.rule == "none"
    own = loaded(folder, "extends: base.yaml\ntermination: {rule: fixed_prefix, n: 5}\n").termination
    assert (own.rule, own.n) == ("fixed_prefix", 5)


def test_paths_are_of_the_files_own_folder_and_bases_have_bases(tree, monkeypatch, tmp_path_factory):
    folder = tree(first=BASE, sub__second="extends: ../first.yaml\nrun: {steps: 7}\n")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    config = loaded(folder, "extends: sub/second.yaml\nrun: {name: top}\n")
    assert (config.run.name, config.run.steps, config.student.path) == ("top", 7, "a")
    files = [file.resolve() for file in config_files(folder / "top.yaml")]
    assert files == [folder / "top.yaml", folder / "sub/second.yaml", folder / "first.yaml"]


def test_an_embedded_configuration_can_be_extended(tree):
    config = loaded(tree(), "extends: demo\nrun: {steps: 3}\n")
    demo = load_config("demo")
    assert config == demo.model_copy(update={"run": demo.run.model_copy(update={"steps": 3})})
    assert config_files(tree() / "top.yaml")[1] == EMBEDDED["demo"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends: base.yaml\nrun: {steps: 0}\n", "top.yaml:2: run.steps = 0: must be a whole number >= 1"),
        ("extends: wrong.yaml\n", "wrong.yaml:2: rollout.max_tokens = 0: must be a whole number >= 1"),
        ("extends: twice.yaml\n", "twice.yaml:2: run is given twice, first in line 1"),
        (
            "run: {steps: 1}\nextends: nowhere.yaml\n",
            "top.yaml:2: extends = 'nowhere.yaml': there is no nowhere.yaml",
        ),
        ("extends: 3\n", "top.yaml:1: extends = 3: must be the path of a configuration"),
        ("extends: [base.yaml]\n", "top.yaml:1: extends = ['base.yaml']: must be the path of a configuration"),
        ("extends: s3://x/base.yaml\n", "s3://x/base.yaml"),
        ("extends: .\n", "cannot be read: Is a directory"),
        (
            "extends: round.yaml\n",
            "round.yaml:1: extends = './sub/../top.yaml': leads back to itself: top.yaml -> round.yaml -> "
            "sub/../top.yaml",
        ),
        ("extends: top.yaml\n", "top.yaml:1: extends = 'top.yaml': leads back to itself: top.yaml -> top.yaml"),
    ],
)
def test_messages_name_the_file_and_the_line(tree, text, says):
    folder = tree(
        base=BASE,
        wrong="extends: base.yaml\nrollout: {max_tokens: 0}\n",
        twice="run: {}\nrun: {}\n",
        round="extends: ./sub/../top.yaml\n",
        sub__x="",
    )
    assert says in refusal(folder, text)
