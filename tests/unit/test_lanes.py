"""Which tests run beside which."""

from collections import Counter

from tests.lanes import ROOT, group_of
from tests.order import LONGEST, place


def test_every_file_has_one_group():
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
    groups = Counter(map(group_of, files))
    assert groups["own"] > 5 and groups["shared"] > 5
    assert sum(groups.values()) - groups["own"] - groups["shared"] == len(groups) - 2, "the others by themselves"


def test_whoever_starts_a_ray_says_so():
    """What starts a cluster must not run beside another one that does."""
    starts = ("local_cluster(", "kuberay(", "fake_nodes(", "ray_process(")
    for path in (ROOT / "tests").rglob("test_*.py"):
        text, file = path.read_text(), path.relative_to(ROOT).as_posix()
        if path.name != "test_lanes.py" and any(word in text for word in starts):
            assert group_of(file) == "own", f"{file}: its tests take the fixture own_ray"


def test_the_longest_come_first(request):
    assert [file for file in LONGEST if not (ROOT / file).is_file()] == []
    files = [item.nodeid.split("::")[0] for item in request.session.items]
    assert files == sorted(files, key=place)
