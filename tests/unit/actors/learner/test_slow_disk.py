"""Who waits for a slow disk is not stuck."""

from concurrent.futures import Future

from actors.learner.snapshots import Snapshots


def test_a_rank_that_waits_for_its_files_shows_progress():
    snapshots = Snapshots.__new__(Snapshots)
    snapshots._writing, beats = Future(), []
    writing = snapshots._writing

    def beat():
        beats.append(1)
        if len(beats) == 2:
            writing.set_result({"file": "digest"})

    assert snapshots.written(beat) == {"file": "digest"} and len(beats) == 2
