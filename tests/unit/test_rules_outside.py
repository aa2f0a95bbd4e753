"""Rules from outside: found by their entry points, and refused with one message (docs/howto has a whole one)."""

import json
import subprocess
import sys
import textwrap

import pytest

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


@pytest.mark.parametrize(
    ("code", "points", "message"),
    [
        (OUTSIDE, "even = evn_rule:kind", "cannot be loaded: ModuleNotFoundError: No module named 'evn_rule'"),
        (OUTSIDE, "even = even_rule:knd", "cannot be loaded: AttributeError"),
        ("import even_rule_helper", "even = even_rule:kind", "cannot be loaded: ModuleNotFoundError"),
        ("kind = 3", "even = even_rule:kind", "is no RuleType"),
        (OUTSIDE.replace('"even"', '"kat"'), "even = even_rule:kind", "called 'kat': of kat-ray itself, and of"),
        (OUTSIDE, "even = even_rule:kind\nodd = even_rule:kind", "called 'even': of entry point 'even'"),
    ],
)
def test_a_rule_from_outside_that_is_broken_is_one_message(tmp_path, code, points, message):
    outside(tmp_path, code, points)
    run = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom kat_ray.cli import main as cli\n"
    run += "sys.exit(cli.main(['config', 'demo']))"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert message in line and "entry point" in line and "of even-rule 1.0" in line


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
