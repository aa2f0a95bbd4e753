"""The learner's ranks: one group that starts, waits and is lost as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.exceptions import ObjectLostError

from actors.cluster.actor_groups import ActorGroup
from actors.cluster.handles import Handle, R, Ref, remote, remote_pair
from actors.cluster.waiting import ACTOR_LOST, LearnersLost, last_line
from actors.learner.learner import Learner
from actors.learner.optimizer_state import file_name
from kat_ray.run.checkpoint import FileDigest
from kat_ray.storage.address import Place


def deal(files: Mapping[str, FileDigest], ranks: int) -> list[dict[str, FileDigest]]:
    """Files by rank: its own to each, which it loads next, and the others where there is least to read."""
    shares: list[dict[str, FileDigest]] = [{} for _ in range(ranks)]
    left = dict(files)
    for rank, share in enumerate(shares):
        own = file_name(rank, ranks)
        share |= {own: left.pop(own)} if own in left else {}
    for name, digest in sorted(left.items(), key=lambda item: (-item[1].size, item[0])):
        min(shares, key=lambda share: sum(d.size for d in share.values()))[name] = digest
    return shares


class LearnerGroup(ActorGroup[Learner]):
    """Ranks that meet at the first one's address. What one of them loses all of them have lost."""

    def begin_start(self) -> list[Ref[dict[str, Any]]]:
        """Have the ranks meet and load the student; pending answers."""
        calls = [remote(self.replicas[0].handle, Learner.address)]
        ((host, port),) = self.supervisor.wait_for_start(calls, "learner 0 to start")
        return [remote(rank, Learner.start)(host, port) for rank in self.handles]

    def wait(
        self, refs: Sequence[Ref[R]], what: str, interruptible: bool = False, limit: str = "step_timeout"
    ) -> list[R]:
        """Results of ranks, within `cluster.<limit>`; `LearnersLost` if one of them died.

        A lost record is no lost learner, and passes through.
        """
        try:
            return self.supervisor.wait(refs, what, limit, interruptible)
        except ObjectLostError:
            raise
        except ACTOR_LOST as error:
            raise LearnersLost(last_line(error)) from error

    def on_all(self, request: Callable[[Handle[Learner]], Ref[R]], what: str) -> list[R]:
        """`request(rank)` on all ranks at once."""
        return self.wait([request(rank) for rank in self.handles], what)

    def find_damage(self, path: Place, files: Mapping[str, FileDigest]) -> str | None:
        """Have the ranks read a checkpoint's files, each about as many bytes: what is wrong with one, or None."""
        shares = deal(files, len(self.replicas))
        calls = [
            remote(rank, Learner.find_damage)(str(path), share)
            for rank, share in zip(self.handles, shares, strict=True)
        ]
        found = self.wait(calls, f"the checkpoint {path} to be verified")
        return next((damage for damage in found if damage), None)

    def restart(self, error: LearnersLost) -> None:
        """End all ranks, and have a new group meet; it holds the student as it was given."""
        lost: LearnersLost | None = error
        while lost is not None:
            self.supervisor.lost(self.replicas[0], lost)
            for replica in self.replicas:
                self.revive(replica)
            try:
                self.wait(self.begin_start(), "the learner to start again", limit="start_timeout")
                lost = None
            except LearnersLost as again:
                lost = again

    def weights(self, version: int, average: bool = False) -> Any:
        """Reference to the weights under this version, once the first rank has put them into the object store.

        Those of the student, or their average.
        """
        asked = Learner.average if average else Learner.weights
        pairs = [remote_pair(rank, asked)(version) for rank in self.handles]
        self.wait([done for _, done in pairs], "the learner's weights")
        return pairs[0][0]
