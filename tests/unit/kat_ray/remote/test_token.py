"""A token is read from where the configuration says, and shows itself nowhere."""

import pickle

import pytest

from kat_ray.config.http_teacher import HttpConfig
from kat_ray.errors import UserError
from kat_ray.remote.token import Token, read_token

SECRET = "hush-hush-5309"


def test_it_is_read_from_a_variable_or_a_file(tmp_path):
    (tmp_path / "token").write_text(f" {SECRET}\n")
    by_file = read_token(HttpConfig(token_file=str(tmp_path / "token")), "teacher", {})
    by_name = read_token(HttpConfig(token_env="THE_TOKEN"), "teacher", {"THE_TOKEN": SECRET})
    assert by_file.reveal() == by_name.reveal() == SECRET
    assert read_token(HttpConfig(), "teacher", {}) is None


def test_nothing_prints_or_takes_it_along():
    token = Token(SECRET)
    assert SECRET not in f"{token} {token!r} {[token]}" and not hasattr(token, "__dict__")
    with pytest.raises(TypeError, match="sent nowhere"):
        pickle.dumps(token)


@pytest.mark.parametrize(
    ("http", "environment", "words"),
    [
        ({"token_env": "THE_TOKEN"}, {}, r"teacher\.http\.token_env = 'THE_TOKEN': there is no such"),
        ({"token_env": "THE_TOKEN"}, {"THE_TOKEN": " \n"}, "must hold a token"),
        ({"token_env": "THE_TOKEN"}, {"THE_TOKEN": f"{SECRET}\r\nX-Header: 1"}, "must hold a token"),
        ({"token_env": "THE_TOKEN"}, {"THE_TOKEN": f"{SECRET}ü"}, "must hold a token"),
        ({"token_file": "/nowhere/token"}, {}, "token_file = '/nowhere/token': cannot be read: No such file"),
    ],
)
def test_what_is_wrong_is_one_message_without_it(http, environment, words):
    with pytest.raises(UserError, match=words) as refused:
        read_token(HttpConfig(**http), "teacher", environment)
    assert SECRET not in str(refused.value)


def test_a_token_in_place_of_a_name_is_not_shown():
    with pytest.raises(ValueError, match="must be the name of an environment variable") as refused:
        HttpConfig(token_env=SECRET)
    assert SECRET not in str(refused.value).split("[type=")[0]
