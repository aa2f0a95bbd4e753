"""What engines are asked."""

from kat_ray.agreement.probes import ANSWER_TOKENS, probes

DATA = [(1, 2, 3), (4,) * 40, (5,) * 9]


def test_probes_are_ragged_within_the_vocabulary_and_the_same_in_every_process():
    found = probes(DATA, 50, 100, {}, seed=3)
    assert found == probes(DATA, 50, 100, {}, seed=3) != probes(DATA, 50, 100, {}, seed=4)
    lengths = [len(p.prompt_ids) for p in found]
    assert len(set(lengths)) == len(lengths) == 5
    assert all(0 <= i < 50 for p in found for i in p.prompt_ids)
    assert {(1, 2, 3), (4,) * 40} <= {p.prompt_ids for p in found}


def test_an_edge_is_passed_where_a_rollout_can_reach_it():
    def beyond(longest, **edges):
        return [p for p in probes(DATA, 50, longest, edges, seed=0) if "past" in p.kind]

    (probe,) = beyond(100, window=64)
    assert len(probe.prompt_ids) == 67 and "past window of 64" in probe.kind
    (probe,) = beyond(60, window=64)  # the answer passes it
    assert len(probe.prompt_ids) == 60
    assert not beyond(64 - ANSWER_TOKENS, window=64)
    assert [len(p.prompt_ids) for p in beyond(200, rope=128, window=32)] == [35, 131]


def test_no_probe_is_longer_than_a_prompt_may_be():
    for longest in (1, 4, 17):
        found = probes(DATA, 50, longest, {"window": 2}, seed=0)
        assert found and all(1 <= len(p.prompt_ids) <= longest for p in found)
