"""Rules from outside: found by their entry points, and refused with one message (docs/howto has a whole one)."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from typing import Literal

import pytest
from pydantic import create_model

from kat_ray.analysis import compare
from kat_ray.analysis.replay import uncensored_rows
from kat_ray.analysis.replay_rules import COLUMNS
from kat_ray.cli import replay
from kat_ray.config.load import load_config
from kat_ray.config.rule_warnings import rule_warnings
from kat_ray.errors import UserError
from kat_ray.run.probes import is_active
from kat_ray.termination import RULES, Effect, RuleType, kat_parameters, make_rule, registry
from kat_ray.termination.settings import CuttingSettings, NoneSettings
from tests.support.paths import ROOT
from tests.support.rules import traces_of

OUTSIDE = '''
from typing import Literal
from kat_ray.termination import Cut, RuleType
from kat_ray.termination.settings import CuttingSettings

class EvenSettings(CuttingSettings):
    """Cuts at the first even token."""
    rule: Literal["even"] = "even"

class Tracker:
    threshold = minimum = cut = weights = None
    seen = 0
    def observe(self, tokens):
        for token in tokens.token_ids:
            if self.cut is None and token % 2 == 0:
                self.cut = Cut(at=self.seen, confirmed=self.seen + 1)
            self.seen += 1
        return self.cut

class Rule:
    threshold, samples, budget = None, 0, None
    def start_step(self, step): pass
    def begin(self, start): return Tracker()
    def end_step(self, finished): pass
    def state(self): return {}
    def load_state(self, state): pass

kind = RuleType(EvenSettings, lambda settings, facts: Rule())
'''


def outside(tmp_path, code=OUTSIDE, points="even = even_rule:kind"):
    """A package with rules, as an installer would leave it."""
    (tmp_path / "even_rule.py").write_text(code)
    info = tmp_path / "even_rule-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: even-rule\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kat_ray.termination_rules]\n{points}\n")


def command_lines(tmp_path, *commands):
    """Exit codes, and what was said, of `kat-ray` commands in one fresh process that finds the package."""
    run = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom kat_ray.cli import main as cli\n"
    run += f"codes = [cli.main(command.split()) for command in {commands!r}]\nprint(*codes, end='')"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False)
    *_, codes = done.stdout.splitlines() or [""]
    return codes, done.stdout, done.stderr.splitlines()


BROKEN = [
    (OUTSIDE, "even = evn_rule:kind", "cannot be loaded: ModuleNotFoundError: No module named 'evn_rule'"),
    (OUTSIDE, "even = even_rule:knd", "cannot be loaded: AttributeError"),
    ("import even_rule_helper", "even = even_rule:kind", "cannot be loaded: ModuleNotFoundError"),
    ("kind = 3", "even = even_rule:kind", "is no RuleType"),
    (OUTSIDE.replace('"even"', '"kat"'), "even = even_rule:kind", "called 'kat': of kat-ray itself, and of"),
    (OUTSIDE, "even = even_rule:kind\nodd = even_rule:kind", "called 'even': of entry point 'even'"),
]


@pytest.mark.parametrize(("code", "points", "message"), BROKEN)
def test_a_rule_from_outside_that_is_broken_is_one_message_where_it_is_asked_for(tmp_path, code, points, message):
    outside(tmp_path, code, points)
    others = ("config demo", "config demo termination.rule=random")
    codes, _, said = command_lines(tmp_path, *others, "config demo termination.rule=even")
    assert codes == "0 0 2"
    (line,) = said
    assert message in line and "entry point" in line and "of even-rule 1.0" in line


def test_a_list_of_the_rules_says_what_is_not_in_it(tmp_path):
    code, points, message = BROKEN[0]
    outside(tmp_path, code, points)
    codes, shown, said = command_lines(tmp_path, "config demo termination.rule=kta", "config --docs")
    assert codes == "2 0" and "### termination.rule: kat_stages" in shown and "termination.rule: even" not in shown
    left_out, mistake = said
    assert message in left_out and "must be one of none, kat, kat_stages" in mistake


def test_a_rule_from_outside_with_the_name_of_our_own_is_refused(tmp_path):
    outside(tmp_path, OUTSIDE.replace('"even"', '"kat"'), "kat = even_rule:kind")
    codes, _, (line,) = command_lines(tmp_path, "config demo", "config demo termination.rule=none")
    assert codes == "2 0"
    assert "two termination rules are called 'kat': of kat-ray itself, and of entry point 'kat'" in line


def test_a_package_that_crashes_stops_only_the_runs_that_want_its_rule(tmp_path):
    outside(tmp_path, "1 / 0")
    assert command_lines(tmp_path, "config demo")[0] == "0"
    codes, _, said = command_lines(tmp_path, "config demo termination.rule=even")
    assert codes == "" and "even_rule.py" in "".join(said) and said[-1].startswith("ZeroDivisionError")


def test_nothing_from_outside_is_imported_until_it_is_asked_for(tmp_path):
    outside(tmp_path)
    script = f"""if True:
        import sys; sys.path.insert(0, {str(tmp_path)!r})
        from kat_ray.config.load import load_config
        from kat_ray.termination import RULES
        load_config("demo", ["termination.rule=repetition"])
        assert "kat" in RULES and "even_rule" not in sys.modules
        assert "even" in RULES and "even_rule" in sys.modules and list(RULES)[-1] == "even"
    """
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_page_of_fields_has_the_rules_from_outside(tmp_path):
    outside(tmp_path)
    _, page, _ = command_lines(tmp_path, "config --docs")
    assert "### termination.rule: even\n\nCuts at the first even token.\n" in page


def test_a_rule_from_outside_is_found_by_its_entry_point(tmp_path):
    outside(tmp_path)
    script = textwrap.dedent("""
        import json, sys
        from kat_ray.config.load import load_config
        import numpy as np
        from kat_ray.termination import NewTokens, RolloutStart, RunFacts, make_rule
        config = load_config("demo", ["termination.rule=even", "termination.probe_share=0.2"])
        tracker = make_rule(config.termination, RunFacts(0, 50)).begin(RolloutStart(0, False))
        cut = tracker.observe(NewTokens(np.zeros(4), np.array([3, 5, 8, 10])))
        print(json.dumps([config.termination.rule, config.termination.probe_share, cut.at, cut.confirmed]))
    """)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{script}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == ["even", 0.2, 2, 3]


def known(monkeypatch, name="plain", **traits):
    """A rule as if it were of another package, with these fields of `RuleType`."""
    fields = {"rule": (Literal[name], name), "run": (str, "")}
    settings = create_model("Settings", __base__=CuttingSettings, **fields)
    kind = RuleType(settings, lambda settings, facts: make_rule(NoneSettings(), facts), **traits)
    monkeypatch.setitem(registry._OWN, name, kind)
    return settings()


def test_a_rule_of_which_nothing_is_said_cuts_from_the_first_step_on(monkeypatch):
    settings = known(monkeypatch)
    assert RULES["plain"].effect is Effect.CUTS and is_active(settings, None)
    assert list(rule_warnings(demo_with(settings))) == [] and replay._grid(settings, [], 100) == {}
    assert set(RULES["plain"].reads) == set(COLUMNS) and kat_parameters(settings) is None
    arms = compare.order_of([compare.parse_arm(text) for text in ("length_matched:of=plain", "plain")])
    assert [(a.rule, a.of) for a in arms] == [("plain", None), ("length_matched", "plain")]


def demo_with(settings):
    return load_config("demo").model_copy(update={"termination": settings})


def test_what_a_rule_says_of_itself_is_heard_everywhere(monkeypatch):
    settings = known(
        monkeypatch, calibrates=True, needs=("overlap",), sweep=lambda s, most: {"probe_share": [0.1, most]},
        warnings=lambda s, run: [f"{run.steps} steps are {s.rule}"],
    )  # fmt: skip
    assert not is_active(settings, None) and is_active(settings, 0.5)
    assert list(rule_warnings(demo_with(settings))) == ["150 steps are plain"]
    assert replay._grid(settings, [], 100) == {"probe_share": [0.1, 100]}
    traces = traces_of([[1.0], [2.0]], probe=[True, False], trapped=[False, True])
    assert uncensored_rows(traces, demo_with(settings)).tolist() == [0, 1], "it was not active yet"
    with pytest.raises(UserError, match="--rule plain: it needs the overlap of every token"):
        replay._check_columns(traces, settings)


@pytest.mark.parametrize("effect", [Effect.NOTHING, Effect.WEIGHS])
def test_a_rule_that_ends_nothing_is_neither_replayed_nor_copied(monkeypatch, effect):
    known(monkeypatch, effect=effect)
    with pytest.raises(UserError, match="--rule 'plain': must be one of kat, fixed_prefix"):
        replay._base(load_config("demo"), "plain")
    with pytest.raises(UserError, match="plain has no cuts whose lengths could be copied"):
        compare.order_of([compare.parse_arm(text) for text in ("length_matched:of=plain", "plain")])


def test_a_control_copies_the_run_of_the_arm_that_it_names(monkeypatch, tmp_path):
    known(monkeypatch, name="control", copies="run")
    arms = compare.order_of([compare.parse_arm(text) for text in ("control", "kat")])
    assert [(a.rule, a.of) for a in arms] == [("kat", None), ("control", "kat")]
    with pytest.raises(
        UserError, match="--rules control: add kat, whose lengths it copies, or name a run: control:"
    ):
        compare.order_of([compare.parse_arm("control")])


BUILD = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
"""

USES_PATIENCE = """
import json, sys
from actors.monitor.trap_monitor import TrapMonitor
from importlib.metadata import entry_points
from kat_ray.analysis.replay_rules import follow
from kat_ray.config import Config
from kat_ray.config.load import load_config
from kat_ray.termination import RunFacts
from kat_ray.types.records import EngineEnd
from tests.support.chunks import chunk
from tests.support.rules import traces_of

(point,) = entry_points(group="kat_ray.termination_rules")
config = load_config("demo", sys.argv[1:])
assert Config.model_validate_json(config.model_dump_json()) == config
settings, facts = config.termination, RunFacts(0, 50)
monitor = TrapMonitor(settings, facts)
monitor.start_step(0, [0, 1], [False, False])
decision = monitor.observe(chunk([0, 1], [0, 0], [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [0, EngineEnd.EOS]))
replayed = follow(traces_of([[1.0, 0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), settings, facts)
print(json.dumps({
    "package": point.dist.name, "module": type(settings).__module__, "settings": settings.model_dump(),
    "monitor": decision.rollout_ids.tolist(), "replay": replayed.cut.tolist(),
}))
"""


@pytest.mark.integration  # it installs a package
def test_the_rule_of_the_documentation_works_once_it_is_installed(tmp_path):
    """As a stranger does it: the two blocks of the page, `pip install`, `termination.rule=patience`."""
    text = (ROOT / "docs" / "howto" / "termination-rule.md").read_text(encoding="utf-8")
    project, code = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)[0] for kind in ("toml", "python"))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "pyproject.toml").write_text(BUILD + project)
    (tmp_path / "package" / "my_rules.py").write_text(code)
    install = "-m pip install -q --no-deps --no-index --no-build-isolation --disable-pip-version-check --target"
    subprocess.run([sys.executable, *install.split(), tmp_path / "site", tmp_path / "package"], check=True)
    shutil.rmtree(tmp_path / "package")
    overrides = ["termination.rule=patience", "termination.level=0.005", "termination.tokens=2"]
    done = subprocess.run(
        [sys.executable, "-c", USES_PATIENCE, *overrides], capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "package": "my-rules", "module": "my_rules",
        "settings": {"rule": "patience", "probe_share": 0.1, "level": 0.005, "tokens": 2},
        "monitor": [0], "replay": [1, -1],
    }  # fmt: skip
