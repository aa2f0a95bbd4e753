"""The documentation against the tree: the paths, links, modules, classes and commands that it names are there."""

import ast
import functools
import re

import pytest
import yaml

from tests.support.house import FLOOR
from tests.support.paths import ROOT

# Records of a day keep the names of that day: docs/glossary.md translates them.
DATED = {"docs/log.md", "docs/benchmarks.md", "CHANGELOG.md"}
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", ".github/**/*.md", "kat_ray/**/*.md")
    for page in ROOT.glob(pattern)
)
NOW = [page for page in PAGES if page not in DATED]  # what is said of the tree as it is
PATH = re.compile(r"(?<![\w/.:-])(?:kat_ray|actors|tests|deploy|docker|docs|\.ci|\.github)/[\w.*{},/-]*")
NOT_OURS = {"deploy/kuberay-operator"}  # kubectl's word for a Deployment
ENTRY_POINTS = {"kat_ray.termination_rules"}  # groups, not modules
FOREIGN = {  # classes and kinds of other projects
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "BF16_Optimizer",
    "DistillationTrainer",
    "RayCluster",
    "RayJob",
    "RuntimeDefault",
}


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page):
    """A page without its code blocks: a page on how to add something shows files that are not there yet."""
    return re.sub(r"^( *)```.*?^\1```$", "", text(page), flags=re.M | re.S)


def code_spans(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def slug(heading):
    """The anchor that GitHub gives a heading."""
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")


def headings(page):
    return [slug(title) for title in re.findall(r"^#+ (.*)$", prose(page), re.M)]


def braces(path):
    """`a/{b,c}.py` as `a/b.py` and `a/c.py`."""
    found = re.search(r"\{([^}]*)\}", path)
    if not found:
        return [path]
    return [p for part in found[1].split(",") for p in braces(path[: found.start()] + part + path[found.end() :])]


def is_there(path):
    return bool(list(ROOT.glob(path))) if "*" in path else (ROOT / path).exists()


def names_in(body):
    """Names that the statements of a module or a class bind."""
    for node in body:
        if hasattr(node, "name"):
            yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        else:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


@functools.cache
def defined():
    """The names that each class of the sources binds, and those that each module does."""
    classes, modules = {}, {}
    for file in [p for folder in ("kat_ray", "actors", "tests", ".ci") for p in (ROOT / folder).rglob("*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules[module] = set(names_in(tree.body))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, set()).update(names_in(node.body))
    return classes, modules


def resolves(dotted):
    """Whether a dotted name under kat_ray or actors is a package, a module, or a name that a module defines."""
    _, modules = defined()
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if module in modules:
            rest = parts[end:]
            return not rest or rest[0] in modules[module]
    return False


def missing_paths(page):
    """Of the paths that the text names; those in code blocks are the reader's own."""
    named = {found.rstrip("./,") for found in PATH.findall(prose(page))} - NOT_OURS
    return sorted(path for name in named for path in braces(name) if not is_there(path))


def missing_modules(page):
    spans = (re.match(r"(?:kat_ray|actors)(?:\.\w+)+", span) for span in code_spans(page))
    return sorted(
        {found[0] for found in spans if found and found[0] not in ENTRY_POINTS and not resolves(found[0])}
    )


def missing_classes(page):
    """Of names with two capitals inside (`TeacherScorer`), and of their attributes (`Checkpoints.begin`)."""
    classes, _ = defined()
    missing = set()
    for span in code_spans(page):
        found = re.fullmatch(r"([A-Z][a-z0-9]+[A-Z]\w*|[A-Z]\w+(?=\.))(?:\.(\w+))?(?:\(.*\))?", span)
        if found and found[1] not in FOREIGN:
            name, member = found.groups()
            if name not in classes or (member and member not in classes[name]):
                missing.add(span)
    return sorted(missing)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_resolve(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        file = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        if not file.exists() or (anchor and anchor not in headings(str(file.relative_to(ROOT)))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", NOW)
def test_every_path_is_in_the_tree(page):
    assert missing_paths(page) == []


@pytest.mark.parametrize("page", NOW)
def test_every_module_and_class_is_in_the_tree(page):
    assert missing_modules(page) == []
    if page != "docs/kubernetes.md":  # full of Kubernetes' own words; tests/deploy/test_page.py holds it
        assert missing_classes(page) == []


def test_the_checks_find_what_is_missing(monkeypatch):
    wrong = (
        "`actors/nowhere.py`, kat_ray/config/{load,lod}.py, tests/unit, `TeacherScorer` `TeacherScorr` "
        "`kat_ray.config.load.load_config` `kat_ray.config.load.lod_config` `kat_ray.lod` `Checkpoints.begin` "
        "`Checkpoints.bgin`"
    )
    monkeypatch.setattr(f"{__name__}.text", lambda page: wrong)
    assert missing_paths("x.md") == ["actors/nowhere.py", "kat_ray/config/lod.py"]
    assert missing_modules("x.md") == ["kat_ray.config.load.lod_config", "kat_ray.lod"]
    assert missing_classes("x.md") == ["Checkpoints.bgin", "TeacherScorr"]


def test_the_floors_are_those_that_the_imports_are_held_to():
    block = re.search(r"no other room of its own:\n\n(.*?)\n\n", text("docs/architecture.md"), re.S)[1]
    floors = {}
    for number, line in enumerate(reversed(block.splitlines())):
        rooms = re.match(r"(?: +(?:kat_ray|actors)\.\w+)+(?= |$)", line)[0].split()
        rooms += re.findall(r"  ((?:kat_ray|actors)\.\w+)", line)
        floors |= dict.fromkeys(rooms, number)
    assert floors == FLOOR


def test_every_page_is_on_the_map():
    index = text("docs/README.md")
    pages = [p.removeprefix("docs/") for p in PAGES if p.startswith("docs/") and p != "docs/README.md"]
    folders = {"decisions/", "recipes/"}  # listed by one link
    unlisted = [p for p in pages if f"]({p})" not in index and not p.startswith(tuple(folders))]
    assert unlisted == [] and all(f"]({folder})" in index for folder in folders)


def test_every_answer_names_one_file():
    table = re.search(r"## Where is \.\.\.\?\n(.*?)(?=\n## )", text("docs/README.md"), re.S)[1]
    rows = [row.split("|") for row in table.splitlines() if row.startswith("| ")][2:]
    assert len(rows) >= 15
    for _, question, file, *_ in rows:
        assert len(PATH.findall(file)) == 1, question


def test_every_fix_names_a_test_that_is_there():
    """By its file, and by its name without the first word."""
    named = re.findall(r"`(test_\w+)(?:::(\w+))?[^`]*`", text("docs/fixes.md"))
    assert len(named) > 80
    for file, name in named:
        code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob(f"{file}.py"))
        assert re.search(rf"^ *def test_{name}", code, re.M), f"{file}::{name}"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.M))
    for page in NOW:
        blocks = re.findall(r"^(?:    |\$ )+make ([a-z-]+)", text(page), re.M)
        spans = re.findall(r"`make ([a-z-]+)", text(page))
        assert {*blocks, *spans} <= targets, page


def test_decisions_are_numbered_and_have_three_parts():
    records = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert [int(record.name[:4]) for record in records] == list(range(1, len(records) + 1))
    for record in records:
        page = record.read_text(encoding="utf-8")
        assert re.match(rf"# {int(record.name[:4])}\. ", page), record.name
        assert re.findall(r"^## (.*)$", page, re.M) == ["Context", "Decision", "Consequences"], record.name


def test_hooks_and_workflow_call_what_is_there():
    hooks = yaml.safe_load(text(".pre-commit-config.yaml"))
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"], "hooks need no network"
    for form in ROOT.glob(".github/**/*.yml"):
        assert yaml.safe_load(form.read_text(encoding="utf-8")), form
    workflow = text(".github/workflows/ci.yml")
    assert yaml.safe_load(workflow)["jobs"] and "bash .ci/run" in workflow
    called = re.findall(r"-m pytest .*?(tests/\S+)", workflow)
    assert called == ["tests/deploy/test_release.py"] and all(is_there(path) for path in called)
