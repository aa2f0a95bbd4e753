"""docs/kubernetes.md against the tree: what it names is there, its commands are taken, what it shows is current."""

import itertools
import re
import shlex

import pytest
import yaml

from kat_ray.cli import main as cli
from kat_ray.config.load import load_config
from tests.deploy.manifests import CHART, NAMESPACE, PROFILES, ROOT, merged, notes, one, rendered

TEXT = (ROOT / "docs/kubernetes.md").read_text()
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
OWN = {"my-run.yaml", "my.yaml", "prompts.jsonl"}  # the reader's files


def blocks(text):
    """Indented code blocks, without their indentation."""
    found, block = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("    ") and line.strip():
            block.append(line)
        elif block:
            indent = min(len(li) - len(li.lstrip()) for li in block)
            found.append("\n".join(li[indent:] for li in block))
            block = []
    return found


def commands(name, text=TEXT, inline=True):
    """Words of every line of the code blocks, and of code in the text, that calls a program."""
    lines = [line for block in blocks(text) for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text) if inline else []
    found = []
    for line in lines:
        words = shlex.split(re.sub(r"\$\([^)]*\)", "TOKEN", line.removeprefix("$ ")), comments=True)
        if words[:1] == [name] and len(words) > 1:
            found.append([w for w in words if w not in ("&", "&&", "...")])
    return found


def test_every_path_exists():
    named = set(re.findall(r"(?<![\w/.])((?:deploy|docker|tests|kat_ray|actors)/[\w*./{}-]*)", TEXT))
    assert len(named) > 12
    for path in named - {"deploy/kuberay-operator"}:  # kubectl's word for a Deployment
        path = path.rstrip("./")
        assert list(ROOT.glob(path)) if "*" in path else (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert link.startswith("http") or (ROOT / "docs" / link).exists(), link
    for page, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", TEXT):
        text = (ROOT / "docs" / page).read_text() if page else TEXT
        titles = {
            re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.*)$", text, re.M)
        }
        assert anchor in titles, f"{page}#{anchor}"


def helm_values(words):
    """Release and values of a helm command as it stands."""
    files, sets, rest = [], {}, []
    words = iter(words)
    for word in words:
        if word == "-f":
            files.append(next(words))
        elif word == "--set":
            key, _, value = next(words).partition("=")
            *parents, last = key.split(".")
            at = sets
            for name in parents:
                at = at.setdefault(name, {})
            at[last] = yaml.safe_load(value) if value else ""
        elif word == "--namespace":
            assert next(words) == NAMESPACE
        elif word == "--timeout":
            assert re.fullmatch(r"[0-9]+[hms]", next(words))
        else:
            rest.append(word)
    values = {}
    for file in files:
        values = merged(values, yaml.safe_load(my_run() if file in OWN else (ROOT / file).read_text()))
    return rest, merged(values, sets)


def my_run():
    """The reader's values file, as the page writes it."""
    (text,) = re.findall(r"```yaml\n\s*# my-run.yaml\n(.*?)```", TEXT, re.S)
    return text


def test_every_helm_command_renders():
    seen = []
    for words in commands("helm"):
        if not any(word.startswith("deploy/") for word in words):
            continue
        (_, verb, release, chart), values = helm_values(words)
        assert verb in ("install", "template") and ROOT / chart == CHART
        assert rendered(values, release)
        seen.append(release)
    assert seen == ["smoke", "r1", "lab", "big", "r1"]


def test_a_wrong_helm_command_is_noticed():
    wrong = "    helm install r1 deploy/kuberay/chart -f deploy/kuberay/profiles/run.yaml --set job.que=a\n"
    ((_, _, release, _), values) = helm_values(commands("helm", wrong)[0])
    with pytest.raises(Exception, match="que"):
        rendered(values, release)


FIELDS = set(re.findall(r"^(?:\| `|### )([a-z_.]+)(?:` \||:)", (ROOT / "docs/configuration.md").read_text(), re.M))


def resolves(path):
    """Whether a dotted path names a value of the chart or a field of the configuration."""
    at = VALUES
    for name in path.split("."):
        if not isinstance(at, dict) or name not in at:
            return path.removeprefix("run.config.") in FIELDS
        at = at[name]
    return True


def test_every_value_exists():
    sections = VALUES.keys() | {path.split(".")[0] for path in FIELDS}
    named = set()
    for code in re.findall(r"`([^`\n]+)`", TEXT):
        path = code.split("=")[0].split(" ")[0]
        if re.fullmatch(r"[a-z][A-Za-z_]*(\.[A-Za-z_]+)+", path) and path.split(".")[0] in sections:
            named.add(path)
    named -= {f"{name}.yaml" for name in PROFILES}
    assert len(named) > 30 and not resolves("job.que") and not resolves("run.config.run.graze")
    assert {path for path in named if not resolves(path)} == set()


def test_every_kubectl_command_names_what_is_made():
    """Files that are there, kinds and names that the tree or the page makes, the namespace that the page uses."""
    made = {"kat-ray-runs", "default-deny-ingress", "lab", "lab-head-svc", "r1", "r1-head-svc", "smoke", "files"}
    made |= {
        "kat-ray-redis",
        "hub",
        "ray-token",
        "pull",
        "NAME-head-svc",
        "TOKEN",
    }  # the last: what another command says
    checked = 0
    for words in commands("kubectl"):
        for flag, value in itertools.pairwise(words):
            if flag == "-n":
                assert value in (NAMESPACE, "kuberay-operator")
            if flag == "-f":
                assert (ROOT / value).exists(), value
        for word in words:
            kind, _, name = word.partition("/")
            if kind in ("service", "secret", "pod", "statefulset") and name:
                assert name in made, " ".join(words)
                checked += 1
        if "secret" in words and "generic" not in words and "docker-registry" not in words:
            assert words[words.index("secret") + 1] in made
            checked += 1
    assert checked >= 6


def test_secrets_are_those_that_the_values_name():
    made = {w[w.index("generic") + 1]: w for w in commands("kubectl") if "generic" in w}
    secret = yaml.safe_load(PROFILES["interactive"].read_text())["gcsFaultTolerance"]["passwordSecret"]
    assert any(word.startswith(f"--from-literal={secret['key']}=") for word in made[secret["name"]])
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    assert "key: token" in templates and any("=token=" in word for word in made["hub"])
    assert any("=auth_token=" in word for word in made["ray-token"])


def test_rendered_output_is_current():
    """The page's words for what Helm prints are those that it prints."""
    page = [line.strip() for line in TEXT.splitlines()]
    for profile, name in (("run", "r1"), ("interactive", "lab")):
        said = notes(profile, name)
        lines = [line.strip() for line in said.splitlines() if line.startswith("  kubectl") or "export" in line]
        assert len(lines) >= 3
        assert [line for line in lines if line not in page] == []
    docs = [d for t, x in rendered(yaml.safe_load(PROFILES["run"].read_text()), "r1").items() if t.endswith(".yaml")
            for d in yaml.safe_load_all(x) if d]  # fmt: skip
    for kind, name in (("PodMonitor", "r1"), ("PrometheusRule", "r1"), ("ConfigMap", "r1-dashboard")):
        assert f"{kind} {name}" in page and one(docs, kind, name)


def takes(words):
    """A kat-ray command line goes through the parser; its overrides through the configuration."""
    args = cli._parse(words[1:])
    if overrides := getattr(args, "overrides", None):
        load_config("demo", overrides)
    return args


def test_every_kat_ray_command_is_taken():
    lines = commands("kat-ray", inline=False)
    assert {words[1] for words in lines} >= {"doctor", "submit", "stop"}
    for words in lines:
        takes(words)


@pytest.mark.parametrize("profile", ["run", "interactive"])
def test_the_notes_say_commands_that_are_taken(profile):
    text = notes(profile, "r1")
    submit = [line.split() for line in text.splitlines() if line.startswith("  kat-ray")]
    assert len(submit) == (profile == "interactive")
    for words in submit:
        takes(words)
        assert {"cluster.by_role=true", "cluster.placement_timeout=1800", "run.dir=/runs"} <= set(words)
    for line in [li for li in text.splitlines() if "ray job submit" in li]:
        takes(shlex.split(line.split(" -- ")[1]))


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {words[1] for words in commands("make")} | set(re.findall(r"`make ([a-z-]+)", TEXT))
    assert named and named <= targets


def test_every_numbered_step_says_what_to_expect():
    steps = re.split(r"^\d\. \*\*", TEXT.split("## A cluster that stays")[0], flags=re.M)[1:]
    assert len(steps) == 9
    for step in steps:
        assert re.search(r"Expected|run here|as `docker/install.sh` reports|SUCCEEDED", step), step[:60]
