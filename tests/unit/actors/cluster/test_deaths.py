"""What Ray's errors say of an actor that died: whether it is gone for good, or comes back."""

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from actors.cluster.waiting import is_for_good

ACTOR = b"\x19" * 16


def context(**fields):
    return ActorDiedError(ActorDiedErrorContext(actor_id=ACTOR, **fields))


def raised():
    try:
        raise ValueError("no room on the device")
    except ValueError as error:
        return ActorDiedError(RayTaskError("__init__", "Traceback", error, actor_id=ACTOR.hex()))


@pytest.mark.parametrize(
    ("error", "for_good"),
    [
        (context(error_message="The actor was killed by its owner."), True),
        (context(pid=7, error_message="never ran", never_started=True), True),
        (raised(), True),
        (context(), False),  # seen after the loss of a node that had been told to go
        (context(pid=7, class_name="Learner"), False),
        (ActorDiedError(), False),
        (ActorUnavailableError("The actor is restarting.", ACTOR), False),
        (ConnectionError("refused"), False),
    ],
)
def test_only_a_death_with_a_reason_is_for_good(error, for_good):
    assert is_for_good(error) is for_good
