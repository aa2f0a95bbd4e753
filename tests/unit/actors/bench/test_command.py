"""What `kat-ray bench` says of its groups."""

import re

from actors.bench.command import GROUPS
from kat_ray.cli.help import ABOUT_BENCH


def test_help_names_every_group():
    named = re.search(r"Groups: (.*?) Leave", ABOUT_BENCH, re.DOTALL).group(1)
    aside = r"\(.*?\)"
    names = re.split(r",?\s+(?:and\s+)?", re.sub(aside, "", named.rstrip("."), flags=re.DOTALL).replace(" ,", ","))
    assert set(names) == set(GROUPS) and len(names) == len(GROUPS)
