"""What is read from answers of a vLLM server, in the shapes of a real one (tests/cluster/test_vllm_server.py)."""

import json
import math

import pytest

from kat_ray.errors import UserError
from kat_ray.remote.client import Answer
from kat_ray.remote.vllm import next_request, next_scores, plain_request, plain_values, top_request, top_values


def answer(body, status=200):
    return Answer(status, json.dumps(body).encode(), "http://a/v1/completions")


def completion(top, usage=None):
    logprobs = {"token_logprobs": [-1.0], "tokens": ["token_id:3"], "top_logprobs": [top]}
    return {"choices": [{"logprobs": logprobs, "prompt_logprobs": None}], "usage": usage}


def test_ids_are_asked_for_whatever_the_servers_defaults_are():
    body = json.loads(next_request("m", (5, 6), [3, 9]).body)
    assert body["prompt"] == [5, 6] and body["logprob_token_ids"] == [3, 9] and body["max_tokens"] == 1
    assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (1, 1, 0, 1)
    assert json.loads(plain_request("m", [5, 6]).body)["prompt_logprobs"] == 0


def test_values_are_those_of_the_ids_in_their_order():
    top = {"token_id:9": -1.25, "token_id:3": -0.5, "token_id:4": -9999.0, "token_id:7": None}
    usage = {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 32}}
    found = next_scores(answer(completion(top, usage)), [3, 9, 4, 7], "it")
    assert found.logprobs[:3] == [-0.5, -1.25, -math.inf] and math.isnan(found.logprobs[3]) and found.run == 8
    told_less = next_scores(
        answer(completion(top, {"prompt_tokens": 40, "prompt_tokens_details": None})), [3], "it"
    )
    assert told_less.run == 40, "what is not said to be cached counts as run"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (answer({"error": {"message": "no such thing"}}, 400), r"answers 400: .*no such thing"),
        (Answer(200, b"<html>", "http://a/x"), "is no JSON object"),
        (answer({"choices": []}), "does not give log-probabilities of chosen ids"),
        (answer({"choices": [{"logprobs": None}]}), "does not give log-probabilities of chosen ids"),
        (answer(completion({"token_id:3": -0.5, "token_id:8": -2.0})), "own most likely ids do not suffice"),
        (answer(completion({"token_id:3": 4.0, "token_id:9": 2.0})), "start it with --logprobs-mode raw_logprobs"),
    ],
)
def test_what_is_no_such_answer_is_named(given, words):
    with pytest.raises(UserError, match=words):
        next_scores(given, [3, 9], "it")


def test_a_texts_own_log_probabilities():
    rows = [None, {"6": {"logprob": -0.5, "rank": 1}}, {"7": {"logprob": -9999.0}, "2": {"logprob": -0.1}}]
    found = plain_values(answer({"choices": [{"prompt_logprobs": rows}]}), [5, 6, 7], "it")
    assert math.isnan(found[0]) and found[1:] == [-0.5, -math.inf]
    with pytest.raises(UserError, match="the log-probabilities of a prompt"):
        plain_values(answer({"choices": [{"prompt_logprobs": rows}]}), [5, 6], "it")


def test_the_servers_own_most_likely_ids():
    """The text's own token stands first, also where it is none of them; the last rows are looked at."""
    rows = [
        None,
        {"6": {"logprob": -0.5, "rank": 1}, "9": {"logprob": -1.5, "rank": 2}},
        {"7": {"logprob": -8.0, "rank": 50}, "2": {"logprob": -0.1}, "3": {"logprob": -2.5}},
        {"3": {"logprob": -2.0}, "2": {"logprob": -0.25}, "5": {"logprob": -9999.0}},
    ]
    body = {"choices": [{"prompt_logprobs": rows}], "usage": {"prompt_tokens": 4}}
    found = top_values(answer(body), 4, 2, 2, "it")
    assert found.ids == [[2, 3], [2, 3]] and found.logprobs == [[-0.1, -2.5], [-0.25, -2.0]] and found.run == 4
    assert top_values(answer(body), 4, 1, 3, "it").logprobs == [[-0.25, -2.0, -math.inf]]
    assert json.loads(top_request("m", [5, 6], 7).body)["prompt_logprobs"] == 7
    for tokens, top in ((4, 4), (5, 2)):
        with pytest.raises(UserError, match=f"its {top} most likely ids"):
            top_values(answer(body), tokens, 2, top, "it")
