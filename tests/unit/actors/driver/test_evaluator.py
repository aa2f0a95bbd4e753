"""An evaluation: whose stop ids end an answer, and with which seeds it is drawn."""

from types import SimpleNamespace

import pytest

from actors.driver.evaluator import Evaluator
from kat_ray.types.records import Prompt
from tests.support.configs import make_config


class Samplers:
    """One sampler, whose model ends every answer with its own stop id."""

    replicas, version = ("sampler:0",), 0
    supervisor = SimpleNamespace(check=lambda interruptible: None)

    def __init__(self, stop_ids):
        self.stop_ids = stop_ids

    def call(self, complete, *_, **__):
        def remote(prompts, seeds, settings, version):
            self.given = settings.stop_ids
            self.asked = list(zip(prompts, seeds, strict=True))
            return [[4, 5, self.stop_ids[-1]] for _ in prompts]

        return [complete(0, SimpleNamespace(complete=SimpleNamespace(remote=remote)))]


@pytest.mark.parametrize("stop_ids", [(1, 9), (9,), (1,)])
def test_an_answer_that_ended_is_not_called_truncated(stop_ids):
    config = make_config("s", "t", evaluation={"k": 2})
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "7")
    evaluator = Evaluator(config, [Prompt("p", (2, 3), "7")], tokenizer)
    samplers = Samplers(stop_ids)
    result = evaluator.run(samplers)
    assert samplers.given == stop_ids and result.truncated_share == 0.0
    samplers.stop_ids = (8, 6)
    assert evaluator.run(samplers).truncated_share == 0.0 and samplers.given == (8, 6), "another model's"


def test_fewer_answers_are_the_first_of_each_problem():
    config = make_config("s", "t", evaluation={"k": 3})
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "7")
    problems = [Prompt("p", (2, 3), "7"), Prompt("q", (5,), "7")]
    samplers = Samplers((1,))
    evaluator = Evaluator(config, problems, tokenizer)
    evaluator.run(samplers)
    whole = samplers.asked
    result = evaluator.run(samplers, 2)
    assert samplers.asked == [*whole[:2], *whole[3:5]] and len(set(whole)) == 6
    assert (result.k, result.right) == (2, (2, 2))
