"""Builds the documentation's site: `python docs/site/build.py OUT [--sphinx PYTHON]`; `make site`.

Pages are read as they are on GitHub: laid out in a folder as in the tree, so that their links hold, with a page of
every command's help, written from the parser itself. A warning of Sphinx ends the build, and so does a link in what
was built that leads nowhere, or something that a browser would fetch from elsewhere.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = ("*.md", "docs/**/*.md", "kat_ray/**/*.md")
COMMANDS = "docs/commands.md"
# What the sidebar shows, by heading. A page that no group names is under the last one.
GROUPS = {
    "Use it": (
        "docs/README.md", COMMANDS, "docs/configuration.md", "docs/data.md", "docs/models.md",
        "docs/termination.md", "docs/rl.md", "docs/teachers.md", "docs/lora.md", "docs/numbers.md",
        "docs/report.md", "docs/tracking.md", "docs/export.md", "kat_ray/demo/README.md", "docs/upgrading.md",
    ),
    "Recipes": ("docs/recipes/README.md", "docs/recipes/[!R]*.md"),
    "Run it": ("docs/kubernetes.md", "docs/gpu.md", "docs/recovery.md", "docs/scaling.md", "SECURITY.md"),
    "What was measured": ("docs/results.md", "docs/benchmarks.md"),
    "Add to it": ("docs/howto/*.md",),
    "Change it": (
        "CONTRIBUTING.md", "docs/architecture.md", "docs/style.md", "docs/testing.md", "docs/fixes.md",
        "docs/glossary.md",
    ),
    "Decisions": ("docs/decisions/README.md", "docs/decisions/0*.md"),
    "More": ("CHANGELOG.md", "docs/log.md"),
}  # fmt: skip
LINK = re.compile(r"(\]\()([^)\s#]+)")
_WIDTH = "100"  # columns of the commands' help


def main() -> int:
    """Build, or say what is wrong with the pages."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder of the site; what is there is replaced")
    parser.add_argument("--sphinx", default=sys.executable, help="the Python that has Sphinx (default: this one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kat-ray-site-") as folder:
        pages = Path(folder) / "pages"
        lay_out(pages)
        shutil.rmtree(args.out, ignore_errors=True)
        sphinx = [args.sphinx, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html", "-c", str(HERE)]
        built = subprocess.run(
            [*sphinx, "-d", f"{folder}/doctrees", str(pages), str(args.out)],
            env=os.environ | {"PYTHONPATH": str(HERE)}, check=False,
        )  # fmt: skip
    if built.returncode:
        return built.returncode
    wrong = list(faults(args.out))
    for fault in wrong:
        print(fault, file=sys.stderr)
    print(f"{args.out}/README.html")
    return 1 if wrong else 0


def lay_out(folder: Path) -> None:
    """All pages, and what they link to, as they lie in the tree; the page of commands; the sidebar."""
    sources = sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})
    for source in sources:
        text = LINK.sub(
            lambda found, source=source: found[1] + _target(found[2], source, folder), source.read_text()
        )
        _write(folder / source.relative_to(ROOT), text)
    _write(folder / COMMANDS, commands_page())
    names = [COMMANDS, *(source.relative_to(ROOT).as_posix() for source in sources)]
    with (folder / "README.md").open("a") as start:
        start.write(sidebar([name for name in names if name != "README.md"], folder))


def _target(link: str, page: Path, folder: Path) -> str:
    """A link as a page has it, to a page; another file of the tree is laid beside the pages."""
    if re.match(r"[a-z]+:", link):
        return link
    found = (page.parent / link).resolve()
    if found.is_dir():
        return f"{link.rstrip('/')}/README.md"
    if found.is_file() and found.suffix != ".md":
        copy = folder / found.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found, copy)
    return link


def commands_page() -> str:
    """Markdown: the help of every command."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from kat_ray.cli.main import help_texts

    with mock.patch.dict(os.environ, COLUMNS=_WIDTH):
        texts = help_texts()
    parts = ["# Commands\n\nWhat `--help` says, written from the parser when this site was built.\n"]
    parts += [f"## {name}\n\n```text\n{text.strip()}\n```\n" for name, text in texts.items()]
    return "\n".join(parts)


def sidebar(names: list[str], folder: Path) -> str:
    """Sphinx's tables of contents, hidden: all pages, each once."""
    left, parts = list(names), []
    for number, (caption, patterns) in enumerate(GROUPS.items()):
        found = [p.relative_to(folder).as_posix() for pattern in patterns for p in sorted(folder.glob(pattern))]
        left = [name for name in left if name not in found]
        found += left if number == len(GROUPS) - 1 else []
        parts.append(f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(found) + "\n```\n")
    return "".join(parts)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class _Page(HTMLParser):
    """What a built page has anchors for, links to, and has a browser fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "search", "index", "next", "prev"):
            self.fetched.append(given.get("href", ""))
        elif tag in ("script", "img", "iframe", "source", "video"):
            self.fetched += [given["src"]] if "src" in given else []


def faults(site: Path) -> Iterator[str]:
    """Links of a built site that lead nowhere, and what its pages and styles fetch from elsewhere."""
    pages = {path: _Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site)
        for link in [*page.links, *page.fetched]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.fetched and parts.scheme != "data":
                    yield f"{name}: fetches {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{name}: {link} leads nowhere"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name}: {link} names no heading"
    for style in site.rglob("*.css"):
        for url in re.findall(r"(?:@import\s+|url\()[\"']?((?:https?:)?//[^\"')\s]+)", style.read_text()):
            yield f"{style.relative_to(site)}: fetches {url}"


if __name__ == "__main__":
    sys.exit(main())
