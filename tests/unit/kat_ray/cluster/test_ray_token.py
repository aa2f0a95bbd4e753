"""Ray's token: when it is sent, what is said about one that cannot be right."""

import pytest

from kat_ray.cluster.auth import choose_mode, fault, refused
from kat_ray.errors import UserError


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, None),
        ({"RAY_AUTH_TOKEN": "t"}, "token"),
        ({"RAY_AUTH_TOKEN": "t", "RAY_AUTH_MODE": "disabled"}, "disabled"),
        ({"RAY_AUTH_TOKEN": ""}, None),
    ],
)
def test_a_token_without_a_mode_is_sent(environment, mode):
    choose_mode(environment)
    assert environment.get("RAY_AUTH_MODE") == mode


@pytest.mark.parametrize("content, reason", [(None, "cannot be read"), (b" \n", "is empty"), (b"\xff", "not text")])
def test_a_file_without_a_token(tmp_path, content, reason):
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"RAY_AUTH_TOKEN_PATH = {file}: .*{reason}.*auth_token$"):
        choose_mode({"RAY_AUTH_TOKEN_PATH": str(file)})


def test_where_ray_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    mode = {"RAY_AUTH_MODE": "token"}
    assert "there is no token" in fault(mode)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t\n")
    assert fault(mode) == "" and "~/.ray/auth_token" in refused(mode)
    other = mode | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    assert "none: cannot be read" in fault(other), "the file that is named goes before the one at home"
    assert fault(other | {"RAY_AUTH_TOKEN": "t"}) == ""
    assert "must be token or disabled" in fault({"RAY_AUTH_MODE": "on"})


def test_why_a_call_was_refused():
    assert refused({}).startswith("the cluster asks for a token, and none was sent. Set RAY_AUTH_TOKEN")
    assert "none was sent (RAY_AUTH_MODE = disabled; unset it)" in refused({"RAY_AUTH_MODE": "disabled"})
    sent = refused({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"})
    assert sent.startswith("the cluster does not know this token (of RAY_AUTH_TOKEN). ") and "secret" not in sent
