"""What the page on upgrading promises of configurations of earlier releases; one version everywhere."""

import re
import tomllib

import pytest
import yaml

from tests.support.paths import ROOT


def fields_of(page):
    return set(re.findall(r"^\| `([^`]+)` \|", page, re.M))


@pytest.mark.parametrize("release", ["0.1", "0.2"])
def test_every_field_of_an_earlier_release_is_still_one(release):
    """A field that goes is named on the page, with what to write in its place, and is taken out of the list."""
    before = (ROOT / f"tests/golden/fields-{release}.txt").read_text().split()
    assert len(before) > 150
    assert sorted(set(before) - fields_of((ROOT / "docs/configuration.md").read_text())) == []


def test_defaults_that_are_said_to_have_changed_are_those_of_today():
    """Each field that the table names has the default that it names as today's."""
    page, configuration = ((ROOT / "docs" / name).read_text() for name in ("upgrading.md", "configuration.md"))
    threads = (f"{role}.threads" for role in ("sampler", "scorer", "monitor", "learner"))
    for field in (*threads, "sampler.enforce_eager"):
        assert f"`{field}`" in page
        assert re.search(rf"^\| `{re.escape(field)}` \| `null` \|", configuration, re.M), field


def test_package_chart_images_and_changelog_have_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((ROOT / "deploy/kuberay/chart/Chart.yaml").read_text())
    released = re.search(r"^## \[(\d[^]]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released, "a release has its date"
    images = [re.search(r"^ARG VERSION=(.*)$", (ROOT / f"docker/{name}").read_text(), re.M).group(1)
              for name in ("Dockerfile", "Dockerfile.cpu")]  # fmt: skip
    assert {released.group(1), chart["version"], chart["appVersion"], *images} == {version}
    assert set(re.findall(r"kat-ray:(\d+\.\d+\.\d+)", (ROOT / "docs/kubernetes.md").read_text())) == {version}
