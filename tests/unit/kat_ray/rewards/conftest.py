"""What several tests of rewards take."""

import pytest


@pytest.fixture
def file(tmp_path):
    """Write a file of reward functions; the name of one of them."""

    def write(code, name="score"):
        path = tmp_path / "my_rewards.py"
        path.write_text(code)
        return f"{path}:{name}"

    return write
