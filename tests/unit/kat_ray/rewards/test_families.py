"""reasoning-gym in a grading child: what it makes, how it scores, and what no answer may have it do."""

import ast
import json
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from kat_ray.config import EnvironmentConfig
from kat_ray.errors import UserError
from kat_ray.rewards.child import GradingChild
from kat_ray.rewards.limits import Call, Fault, GradingLimits, Outcome
from kat_ray.rewards.problems import EVALUATES_ITS_OWN, UNSAFE, VERSION, Problem
from kat_ray.rewards.verifiers import grade, pool_of, unmatchable
from kat_ray.types.records import Prompt
from tests.support.paths import ROOT

BARE = Problem("chain_sum", {}, 7, 300, 0, "stated", partial=False, unsafe=False)
EVALUATORS = {"eval", "exec", "parse_expr", "sympify", "execfile", "literal_eval"}


@pytest.fixture(scope="module")
def child():
    limits = GradingLimits(1, 30.0, 60.0, 1.0)
    with GradingChild(limits, ["environment", "problems"]) as started:
        yield started


@pytest.fixture(scope="module")
def made(child):
    """The first problems of a family: index, question and answer each. A test has a seed or a family of its own."""

    def _made(problem, count=1):
        reply = child.ask(Call("problems", {"problem": problem.to_json(), "count": count}))
        assert reply.fault is None, reply.error
        return reply.value

    return _made


@pytest.fixture
def score(child):
    def _score(problem, text):
        reply = child.ask(Call("environment", {"problem": problem.to_json(), "text": text}))
        return reply.value if reply.fault is None else reply

    return _score


def test_an_answer_is_extracted_scored_and_binarised(made, score):
    ((index, question, answer),) = made(BARE)
    problem = BARE.at(index)
    assert question.endswith("=") and int(answer) == eval(question.rpartition(":")[2].strip(" ="))
    assert score(problem, f"Let me see.\nThe answer is {answer}.\nSo.") == 1.0
    assert score(problem, f"<answer>{answer}</answer>") == 1.0
    assert score(problem, f"it may be {answer}") == 0.0, "the family gives a part of 1 for this"
    part = score(replace(problem, partial=True), f"it may be {answer}")
    assert part == len(answer) / len(f"it may be {answer}")
    assert score(replace(problem, reading="tags"), f"The answer is {answer}.") == 0.0
    assert score(replace(problem, reading="first_line"), f" {answer}\n\nState the next:") == 1.0
    assert score(problem, "") == 0.0 and score(problem, "7" * 5000) == 0.0


def test_a_scorer_that_raises_on_words_calls_them_wrong(made, score):
    problem = replace(BARE, family="prime_factorization")
    ((index, _, answer),) = made(problem)
    assert score(problem.at(index), answer) == 1.0
    assert score(problem.at(index), "no idea") == 0.0, "its int() raises"


def test_no_answer_is_executed(made, score, tmp_path):
    problem = replace(BARE, family="string_insertion", unsafe=True)
    ((index, _, answer),) = made(problem)
    marker = tmp_path / "was here"
    attack = f"<answer>['A', __import__('pathlib').Path({str(marker)!r}).touch() or 'B']</answer>"
    kept = problem.at(index)
    refused = score(replace(kept, unsafe=False), attack)
    assert refused.fault is Fault.RAISED and "string_insertion was about to execute text" in refused.error
    assert not marker.exists()
    assert score(replace(kept, unsafe=False), f"<answer>{answer}</answer>") == 1.0, "the next one is graded"
    assert score(kept, attack) == 0.0 and marker.exists(), "with the user's leave it is: the attack is one"


def test_sympy_executes_nothing_either(made, score):
    problem = replace(BARE, family="countdown", unsafe=True)
    ((index, _, answer),) = made(problem)
    kept = problem.at(index)
    assert score(kept, f"<answer>{answer}</answer>") == 1.0
    assert score(replace(kept, unsafe=False), f"<answer>{answer}</answer>").fault is Fault.RAISED


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("chain_sums", {}, "environment.families.chain_sums: reasoning-gym 0.1.25 has no family of this name; did "
            "you mean chain_sum or"),
        ("chain_sum", {"max_term": 3}, "environment.families.chain_sum.settings.max_term: is no setting of this "
            "family; there are min_terms, max_terms, min_digits"),
        ("chain_sum", {"max_terms": 1}, "environment.families.chain_sum.settings (max_terms = 1): are refused: "
            "max_terms must be >= min_terms"),
        ("graph_color", {}, "environment.families.graph_color: its scorer calls none of its own answers right"),
        ("game_of_life_halting", {}, "environment.families.game_of_life_halting: its scorer calls the answer 'zzz "
            "wrong' right"),
        ("coin_flip", {"min_trials": 3, "max_trials": 3}, "environment.families.coin_flip: gives only 8 different "
            "problems"),
        ("word_ladder", {"max_word_length": 30}, "families.word_ladder.settings (max_word_length = 30): are"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_family(child, family, settings, said):
    problem = replace(BARE, family=family, settings=settings)
    reply = child.ask(Call("problems", {"problem": problem.to_json(), "count": 100}))
    assert reply.fault is Fault.RAISED and said in reply.error


@pytest.mark.parametrize(
    ("grader", "field"),
    [("environment", "evaluation.verifier = environment"), ("problems", "environment.type = reasoning_gym")],
)
def test_the_library_is_missing(monkeypatch, tmp_path, grader, field):
    (tmp_path / "reasoning_gym").mkdir()
    (tmp_path / "reasoning_gym/__init__.py").write_text("raise ImportError('there is none')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    limits = GradingLimits(fields="environment.")
    with GradingChild(limits, [grader]) as lacking, pytest.raises(UserError) as error:
        lacking.start(60.0)
    said = str(error.value)
    assert said.startswith(f"{field}: reasoning-gym cannot be used here") and "there is none" in said
    assert "pip install 'kat-ray[reasoning-gym]', and give it memory (environment.memory_gib = 1)" in said


def test_verdicts_of_a_step_by_the_pool_of_the_verifier(made, monkeypatch, child):
    page = made(replace(BARE, seed=11), 3)
    golds = [replace(BARE, seed=11).at(index).to_json() for index, _, _ in page]
    with pool_of("environment", GradingLimits(processes=1)) as pool:
        monkeypatch.setattr(pool, "_children", [child])
        texts = [page[0][2], "zzz", f"It is {page[2][2]}"]
        verdicts = grade(texts, golds, "environment", pool)
        assert verdicts.right == [True, False, False] and verdicts.values == [1.0, 0.0, 0.0]
        partly = [json.dumps(json.loads(gold) | {"partial": True}) for gold in golds]
        verdicts = grade(texts, partly, "environment", pool)
        assert verdicts.right == [True, False, False] and 0 < verdicts.values[2] < 1
        late = grade(texts, golds, "environment", pool, within=0.0)
        assert late.outcomes == (Outcome.NOT_REACHED,) * 3 and late.values == [None] * 3 and late.ran_out == 3
        monkeypatch.setattr(pool, "_children", [])  # it is the module's
    assert unmatchable([Prompt("p", (1,), "anything", problem=golds[0])], "environment") == {}


def test_every_process_makes_the_same_of_a_family_that_draws_from_python_s_common_generator(made):
    lists = Problem("list_functions", {}, 5, 300, 0, "tags", partial=False, unsafe=False)
    with GradingChild(GradingLimits(1, 30.0, 60.0, 1.0), ["problems"]) as other:
        reply = other.ask(Call("problems", {"problem": lists.to_json(), "count": 60}))
    assert reply.value == made(lists, 60)


def test_a_family_has_seeds_of_its_own():
    """Seed and index are added by the library: with neighbouring seeds held-out problems would be trained on."""

    def first(seed, name="gcd"):
        return EnvironmentConfig(families={"gcd": {}, "lcm": {}}, seed=seed, train=10, heldout=2).first(name)

    seeds = [first(0), first(1), first(2), first(0, "lcm")]
    assert len({p.seed for p in seeds}) == 4 and first(0) == first(0)
    assert min(abs(a.seed - b.seed) for a in seeds for b in seeds if a is not b) > 10_000
    assert all(0 <= p.seed < 2**31 for p in seeds) and first(0).size == 4 * 6 + 200
    assert Problem.from_json(first(0).to_json()) == first(0)


# --- the sources of the library ---------------------------------------------------------------------------


def sources():
    """Paths of the library's modules; it is not imported."""
    found = find_spec("reasoning_gym")
    assert found is not None and found.origin is not None, "it is in the locks"
    return sorted(Path(found.origin).parent.rglob("*.py"))


def calls_of(node):
    """Names that a piece of code calls: `f` of f(...), and `m` of x.m(...)."""
    calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
    return {f.id if isinstance(f, ast.Name) else f.attr for f in calls if isinstance(f, ast.Name | ast.Attribute)}


def reached(start, functions):
    """What a function calls, and what the functions of its module do that it calls, in the end."""
    names, todo = set(), [start]
    while todo:
        new = calls_of(todo.pop()) - names
        names |= new
        todo += [function for name in new for function in functions.get(name, ())]
    return names


def evaluating_families(path):
    """Of one module: the families whose scorer reaches what evaluates text."""
    text = path.read_text(encoding="utf-8")
    if not any(f"{name}(" in text for name in EVALUATORS):  # most of them, and quickly seen
        return set()
    tree = ast.parse(text)
    functions, names = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            functions.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "DATASET_NAME":
            names.add(ast.literal_eval(node.value))
    scorers = functions.pop("score_answer", [])
    # A function of the module's own that bears such a name (a parser of logic) is followed like any other.
    foreign = EVALUATORS - functions.keys()
    return (names or {path.stem}) if any(reached(s, functions) & foreign for s in scorers) else set()


def test_every_scorer_that_evaluates_is_known():
    """Read off the installed library: a release with another one does not pass."""
    found = set().union(*map(evaluating_families, sources()))
    assert found == UNSAFE.keys() | set(EVALUATES_ITS_OWN)


def test_evaluation_elsewhere_is_of_its_own_problems():
    """Modules that evaluate where no scorer of theirs leads: if a new one comes, somebody is to look at it."""
    makers = {
        path.stem
        for path in sources()
        if not evaluating_families(path)
        and any(f"{name}(" in path.read_text(encoding="utf-8") for name in EVALUATORS)
        and calls_of(ast.parse(path.read_text(encoding="utf-8"))) & EVALUATORS
    }
    assert makers == {"basic_arithmetic", "codeio", "generators_00_49", "generators_50_99", "propositional_logic"}


def test_the_scan_sees(tmp_path):
    module = tmp_path / "family.py"
    module.write_text(
        "DATASET_NAME = 'f'\nclass D:\n def score_answer(self, a, e):\n  return self.read(a)\n"
        " def read(self, a):\n  return helper(a)\ndef helper(a):\n return EVALUATOR(a)\n"
    )
    assert evaluating_families(module) == set()
    module.write_text(module.read_text().replace("EVALUATOR", "sympy.parse_expr"))
    assert evaluating_families(module) == {"f"}


def test_the_version_is_that_of_the_extra():
    assert version("reasoning-gym") == VERSION
    assert f'"reasoning-gym=={VERSION}"' in (ROOT / "pyproject.toml").read_text()
    for lock in ("cpu", "gpu"):
        assert f"reasoning_gym=={VERSION}\n" in (ROOT / f"docker/requirements-{lock}.lock").read_text()
