"""Which files of tests begin first. Left out: which process takes them (tests/lanes.py)."""

# Those of the first tier that take longest, longest first: for one that begins last, the other core waits.
LONGEST = (
    "tests/unit/kat_ray/report/test_report.py",
    "tests/unit/test_control_plane_schedules.py",
    "tests/unit/kat_ray/rewards/test_verify.py",
    "tests/unit/test_control_plane.py",
    "tests/fuzz/test_configuration.py",
    "tests/unit/test_families.py",
    "tests/unit/actors/learner/test_policy_step.py",
)


def place(file: str) -> int:
    """The longest come first, then all others, among which pytest's order stays."""
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)
