"""What the page on upgrading promises of the configurations of 0.1."""

import re

from tests.support.paths import ROOT


def fields_of(page):
    return set(re.findall(r"^\| `([^`]+)` \|", page, re.M))


def test_every_field_of_an_earlier_release_is_still_one():
    """A field that goes is named on the page, with what to write in its place, and is taken out of the list."""
    before = (ROOT / "tests/golden/fields-0.1.txt").read_text().split()
    assert len(before) > 150
    assert sorted(set(before) - fields_of((ROOT / "docs/configuration.md").read_text())) == []


def test_defaults_that_are_said_to_have_changed_are_those_of_today():
    """Each field that the table names has the default that it names as today's."""
    page, configuration = ((ROOT / "docs" / name).read_text() for name in ("upgrading.md", "configuration.md"))
    threads = (f"{role}.threads" for role in ("sampler", "scorer", "monitor", "learner"))
    for field in (*threads, "sampler.enforce_eager"):
        assert f"`{field}`" in page
        assert re.search(rf"^\| `{re.escape(field)}` \| `null` \|", configuration, re.M), field
