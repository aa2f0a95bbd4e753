"""The documentation's site: what its build finds wrong, and the whole of it, by the locked Sphinx (`make site`)."""

import importlib.util
import subprocess
import sys

import pytest

from kat_ray.cli.main import help_texts
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs/site/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_laid_out_as_in_the_tree_and_each_is_in_the_sidebar_once(build, tmp_path):
    build.lay_out(tmp_path)
    pages = {path.relative_to(ROOT).as_posix() for pattern in build.PAGES for path in ROOT.glob(pattern)}
    laid = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md")}
    assert laid == pages | {build.COMMANDS} and len(pages) > 40
    listed = [line for line in (tmp_path / "README.md").read_text().splitlines() if line in laid]
    assert sorted(listed) == sorted(laid - {"README.md"})
    named = {page for patterns in build.GROUPS.values() for pattern in patterns for page in tmp_path.glob(pattern)}
    forgotten = {page.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("*.md")} - {
        page.relative_to(tmp_path).as_posix() for page in named
    }
    assert forgotten == {"README.md"}, "each other page is in a group that says what it is for"
    assert "](decisions/README.md)" in (tmp_path / "docs/README.md").read_text(), "a folder's page"
    assert (tmp_path / "LICENSE").is_file(), "what pages link to and is no page"


def test_the_commands_page_has_the_help_of_every_command(build):
    page = build.commands_page()
    for name, text in help_texts().items():
        assert f"\n## {name}\n" in page and text.split("\n\n")[1] in page
    assert len(help_texts()) > 10


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ('<a href="b.html">b</a>', "a.html: b.html leads nowhere"),
        ('<a href="#there">there</a>', "a.html: #there names no heading"),
        ('<img src="x.png">', "a.html: x.png leads nowhere"),
        ('<script src="https://cdn.example/x.js"></script>', "a.html: fetches https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//fonts.example/f.css">', "a.html: fetches //fonts.example/f.css"),
        ("<style></style>", "s.css: fetches https://fonts.example/x.woff2"),
    ],
)
def test_dead_links_and_fetches_from_elsewhere_are_found(build, tmp_path, page, fault):
    (tmp_path / "a.html").write_text(
        f'<h1 id="here">h</h1><a href="#here">h</a><a href="https://x.example">x</a>{page}'
    )
    if "s.css" in fault:
        (tmp_path / "s.css").write_text("@font-face { src: url('https://fonts.example/x.woff2') }")
    assert list(build.faults(tmp_path)) == [fault]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. A package registry has to be there, as for every environment."""
    folder = tmp_path_factory.mktemp("site")
    python = folder / "venv" / "bin" / "python"
    lock = ROOT / "docker" / "requirements-docs.lock"
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=300)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-r", lock], check=True, timeout=600)
    built = subprocess.run(
        [sys.executable, ROOT / "docs/site/build.py", folder / "out", "--sphinx", python],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder / "out"


@pytest.mark.nightly
def test_the_site_is_built_with_every_page_and_every_command(site):
    pages = {path.relative_to(ROOT).with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert [page for page in pages if not (site / page).is_file()] == []
    commands = (site / "docs/commands.html").read_text()
    for command in ("train", "submit", "export", "config"):
        assert f"usage: kat-ray {command}" in commands
