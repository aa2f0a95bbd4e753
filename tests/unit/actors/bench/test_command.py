"""What `kat-ray bench` says of its groups."""

import re

from actors.bench.command import GROUPS
from kat_ray.cli.help import ABOUT_BENCH


def test_help_names_every_group():
    named = re.search(r"Groups: (.*?)\.", ABOUT_BENCH, re.DOTALL).group(1)
    assert set(re.findall(r"\b[a-z]+(?:_[a-z]+)*\b", named)) >= set(GROUPS)
    assert not {name for name in re.findall(r"[a-z]+_[a-z_]+", named)} - set(GROUPS)
