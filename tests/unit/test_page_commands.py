"""Every `kat-ray` command that a page, a recipe's comment or `--help` shows is one that the command line takes.

A command is parsed by the real parser, its overrides are read by the real configuration, and files of this
repository that it names are there. What stands for the reader's own: words in CAPITALS, what a shell puts in place
(`$PWD`), `my.yaml` and other paths outside the repository, and `...` for what is left out.
"""

import re
import shlex

import pytest

from kat_ray.analysis.compare import parse_arm
from kat_ray.cli.help import EXAMPLES
from kat_ray.cli.main import _parse
from kat_ray.config.load import load_config
from kat_ray.errors import UserError
from tests.support.paths import ROOT

PATTERNS = ("README.md", "docs/**/*.md", "docs/**/*.yaml", "deploy/**/*.md", "deploy/**/*.yaml", "kat_ray/**/*.md")
FOLLOWED = "docs/howto/"  # to the letter, by test_howto: they add what their commands name
PAGES = sorted({str(p.relative_to(ROOT)) for pattern in PATTERNS for p in ROOT.glob(pattern)})
PAGES = [page for page in PAGES if not page.startswith(FOLLOWED)]
SECTIONS_OF_SETTINGS = ("termination.", "objective.rl.")  # whose fields `replay` and `report` take by themselves
LEFT_OUT = "..."
TREE = ("kat_ray/", "actors/", "tests/", "deploy/", "docker/", "docs/")
NOT_OURS = ("kubectl", "helm")  # `-n kat-ray` is a namespace there
PUNCTUATION = "();<>|&"


def blocks(page):
    """Lines of code: of blocks of a page, of a YAML file's comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".yaml"):
        return re.findall(r"# (.*)", text)
    fenced = re.findall(r"^ *```(?:\w*)\n(.*?)^ *```$", text, re.M | re.S)
    indented = re.findall(r"^(?: {4}|\t).*$", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S), re.M)
    return [line for block in fenced for line in block.splitlines()] + indented


def joined(lines):
    """A command that goes on behind a backslash, in one line; without a prompt."""
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [line.strip().removeprefix("$ ") for line in text.splitlines()]


def simple_commands(line):
    """Words of each simple command of a line of shell, without what is redirected where."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=PUNCTUATION)
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        words = list(lexer)
    except ValueError:  # prose with an apostrophe
        return
    command = []
    for word in [*words, ";"]:
        if set(word) <= set(PUNCTUATION):
            yield command
            command = ["redirected to"] if word in (">", ">>") else []
        else:
            command.append(word)


def commands(lines):
    """Arguments of each `kat-ray` command, whatever runs it (`.venv/bin`, `docker run`)."""
    for line in joined(lines):
        for words in simple_commands(line):
            names = [i for i, word in enumerate(words) if re.fullmatch(r"(\.venv/bin/)?kat-ray", word)]
            if names and words[0] not in NOT_OURS and is_command(words, names[0]):
                yield words[names[0] + 1 :]


def is_command(words, at):
    """Not a sentence that names the program: nothing stands before it but variables, or a container's command."""
    before = words[:at]
    return all(re.match(r"[A-Z_]+=", word) for word in before) or before[0] == "docker"


def is_placeholder(text):
    """As `MODEL`, `TRAIN.jsonl` and `$PWD/runs`."""
    return "$" in text or bool(re.fullmatch(r"[A-Z]{2,}[A-Z_]*(\.\w+)?", text))


def faults(words):
    """What is wrong with a command, in words."""
    words = [word for word in words if word != LEFT_OUT]
    try:
        args = _parse(words)
    except SystemExit as ended:
        return [] if ended.code == 0 else ["the parser refuses it"]
    found = [f"{w} is not in the tree" for w in words if w.startswith(TREE) and not list(ROOT.glob(w))]
    config, overrides = getattr(args, "config", None), getattr(args, "overrides", [])
    if hasattr(args, "settings"):  # runs, and fields of a section
        fields = (ROOT / "tests/golden/fields-0.2.txt").read_text().split()
        names = [w.partition("=")[0] for w in [*args.settings, *overrides] if "=" in w]
        return found + [f"{n} is no field" for n in names if not {s + n for s in SECTIONS_OF_SETTINGS} & {*fields}]
    if config is not None and "=" in config:  # of `train --resume RUN field=value`
        config, overrides = None, [config, *overrides]
    overrides = [o for o in overrides if not is_placeholder(o.partition("=")[2])]
    # Where the reader's own file is meant, the demo's stands for it, with chats.
    if config is None or config.endswith("my.yaml") or is_placeholder(config):
        config, overrides = "demo", ["data.chat_template=true", *overrides]
    try:
        load_config(str(ROOT / config) if config.startswith(TREE) else config, overrides)
    except UserError as error:
        found.append(str(error))
    for rule in getattr(args, "rules", None) or []:
        try:
            parse_arm(rule)
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_commands_are_taken(page):
    wrong = {shlex.join(c): why for c in commands(blocks(page)) if (why := faults(c))}
    assert wrong == {}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_help_are_taken(name):
    # What an example does stands behind it, two spaces or more away.
    lines = [re.sub(r"(?<=\S) {2,}.*", "", line) for line in EXAMPLES[name].splitlines() if "kat-ray" in line]
    found = list(commands(lines))
    assert found and {shlex.join(c): why for c in found if (why := faults(c))} == {}


def test_the_pages_have_commands():
    found = {page: len(list(commands(blocks(page)))) for page in PAGES}
    assert (
        found["README.md"] > 15 and found["docs/results.md"] > 3 and found["docs/recipes/reasoning-gym.yaml"] == 1
    )
    assert sum(found.values()) > 80


def test_what_is_wrong_is_found():
    text = """
    .venv/bin/kat-ray train demo run.stepz=3 > out.txt   # a comment
    A=1 kat-ray trian demo && kat-ray train docs/recipes/nothing.yaml
    $ kat-ray compare demo \\
        --rules kat:bugdet=0.1
    docker run --rm image kat-ray doctor --nothing
    kat-ray train CONFIG student.path=MODEL run.dir=$PWD/runs ...
    kat-ray replay RUN --objective advantage=[grpo,rloo] nothing=1
    kubectl -n kat-ray logs --follow
    the command kat-ray is nothing
    """
    found = [faults(c) for c in commands(text.splitlines())]
    assert [len(why) for why in found] == [1, 1, 2, 1, 1, 0, 1], found
