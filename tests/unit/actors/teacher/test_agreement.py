"""A scorer's side of the check before the first step: pieces and takeovers against plain passes."""

import numpy as np
import pytest

from actors.teacher.agreement import chunked_logprobs
from actors.teacher.settings import ScorerSettings
from actors.teacher.transformers_backend import TransformersTeacher
from kat_ray.agreement.compare import difference
from kat_ray.models.tolerance import logprob_tolerance
from tests.support.configs import make_config

PAIRS = [([5, 6, 7], [9, 4, 2, 8, 8, 7]), ([9] * 40, [3] * 12), (list(range(100, 117)), [50, 60, 70]), ([3], [1])]


class ForgetfulTeacher(TransformersTeacher):
    """Takes a rollout over without what went before."""

    def _feeds(self, chunk):
        feeds = super()._feeds(chunk)
        for i, feed in enumerate(feeds):
            if chunk.whole_past[i] and chunk.start[i] and len(feed.token_ids) > feed.wanted:
                object.__setattr__(feed, "token_ids", feed.token_ids[-feed.wanted :])
        return feeds


def settings_of(models):
    config = make_config(models["student"][0], models["teacher"][0])
    return ScorerSettings.from_config(config, models["teacher"][0], (1,), 128)


def found(teacher):
    pieces, plain = chunked_logprobs(teacher, PAIRS, 16), teacher.plain_logprobs(PAIRS)
    return difference([str(len(p)) for p, _ in PAIRS], pieces, plain)


def test_pieces_agree_and_leave_nothing(models):
    teacher = TransformersTeacher(settings_of(models))
    assert found(teacher).largest < 1e-4
    assert teacher.held == 0


def test_a_plain_pass_holds_and_changes_nothing(models):
    teacher = TransformersTeacher(settings_of(models))
    before = chunked_logprobs(teacher, PAIRS, 16)
    teacher.plain_logprobs(PAIRS)
    np.testing.assert_array_equal(np.concatenate(chunked_logprobs(teacher, PAIRS, 16)), np.concatenate(before))


@pytest.mark.parametrize("teacher", [ForgetfulTeacher])
def test_a_takeover_without_the_past_is_seen(models, teacher):
    assert not found(teacher(settings_of(models))).within(logprob_tolerance("float32", "float32"))
