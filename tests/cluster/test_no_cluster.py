"""An address at which no cluster is: one message that says what to do, exit code 2, nothing left."""

import socket

import pytest

from tests.deploy.ray_process import outside_port
from tests.support.commands import refusal

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("command", ["train", "eval"])
def test_nobody_is_there(call, command):
    words = ["train", "demo"] if command == "train" else ["eval", "nowhere", "--config", "demo"]
    message = refusal(call(*words, f"cluster.address=127.0.0.1:{outside_port()}"))
    assert "no Ray cluster answers there. Start one (`ray start --head`)" in message


def test_silence_has_an_end(call, monkeypatch):
    """Something takes the connection and never answers."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port = mute.getsockname()[1]
        assert "no answer within 30 s" in refusal(call("list", "--address", f"http://127.0.0.1:{port}"))
        message = refusal(call("train", "demo", f"cluster.address=127.0.0.1:{port}"))
        assert "no answer within 15 s" in message or "no Ray cluster answers there" in message
