"""An evaluation: whose stop ids end an answer, and with which seeds it is drawn."""

from types import SimpleNamespace

import pytest

from actors.driver.evaluator import Evaluator
from actors.driver.preparation import Prepared, make_evaluator
from kat_ray.data.prompts import PromptSet
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


def test_every_set_has_its_own_k_verifier_and_sampling():
    sets = {"second": {"data": {"path": "x"}, "k": 2, "temperature": 0.5}, "third": {"data": {"path": "y"}, "k": 5}}
    config = make_config("s", "t", evaluation={"data": {"path": "h"}, "k": 3, "greedy": True, "sets": sets})
    sizes = {"": 4, "second": 1, "third": 2}
    found = {n: PromptSet(tuple(Prompt(f"{n}{i}", (2, i), "7") for i in range(c)), 0, n) for n, c in sizes.items()}
    facts = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens: "7"))
    heldout = found.pop("")
    evaluations = make_evaluator(config, Prepared(facts, heldout, None, heldout, None, heldout_sets=found))
    asked = []

    class Watched(Samplers):
        def call(self, complete, *_, **__):
            def remote(prompts, seeds, settings, version):
                asked.append((len(prompts), settings.temperature))
                return [[4, 1] for _ in prompts]

            return [complete(0, SimpleNamespace(complete=SimpleNamespace(remote=remote)))]

    result = evaluations.run(Watched((1,)))
    assert asked == [(12, 1.0), (4, 0.0), (2, 0.5), (1, 0.0), (10, 1.0), (2, 0.0)]
    assert (result.k, result.problems) == (3, 4)
    assert {name: (own.k, own.problems) for name, own in result.sets.items()} == {
        "greedy": (1, 4), "second": (2, 1), "second/greedy": (1, 1), "third": (5, 2), "third/greedy": (1, 2),
    }  # fmt: skip
    asked.clear()
    evaluations.run(Watched((1,)), 2)  # along the way
    assert [count for count, _ in asked] == [8, 4, 2, 1, 4, 2]
    asked.clear()
    evaluations.run(Watched((1,)), 3)  # a whole one
    assert [count for count, _ in asked] == [12, 4, 2, 1, 10, 2]


def test_a_configuration_with_one_set_is_evaluated_as_ever():
    config = make_config("s", "t", evaluation={"data": {"path": "h"}, "k": 3})
    one = PromptSet((Prompt("p", (2, 3), "7"),), 0, "h")
    facts = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens: "7"))
    result = make_evaluator(config, Prepared(facts, one, None, one, None)).run(Samplers((1,)), 3)
    assert result.sets is None and result.as_dict().keys() == {
        "avg_at_k", "pass_at_k", "k", "problems", "mean_length", "truncated_share", "right", "ran_out",
        "errors",
    }  # fmt: skip
