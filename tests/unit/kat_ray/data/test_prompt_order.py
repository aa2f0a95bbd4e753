"""The order in which prompts are dealt out, and the rollouts that are made of them."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from kat_ray.data.prompt_order import PromptOrder, rollout_specs
from kat_ray.types.records import Prompt, StepStart
from tests.support.configs import make_config

PROMPTS = [Prompt(str(i), (i,)) for i in range(5)]


@given(size=st.integers(1, 12), n=st.integers(1, 30), seed=st.integers(0, 2**31 - 1), shuffle=st.booleans())
@settings(deadline=None, max_examples=50)
def test_every_epoch_is_a_permutation_however_it_is_dealt(size, n, seed, shuffle):
    prompts = [Prompt(str(i), (i,)) for i in range(size)]
    order = PromptOrder(prompts, seed, shuffle)
    dealt = [p.prompt_id for step in range(2 * size) for p in order.take(range(step * n, (step + 1) * n))]
    epochs = [dealt[i : i + size] for i in range(0, len(dealt), size)]
    assert len(epochs) == 2 * n
    assert all(Counter(e) == Counter(p.prompt_id for p in prompts) for e in epochs)
    # batches of another size continue the same order, and a step can be asked for by itself
    again = PromptOrder(prompts, seed, shuffle)
    assert [p.prompt_id for s in range(size) for p in again.take(range(s, s + 1))] == epochs[0]
    last = range((2 * size - 1) * n, 2 * size * n)
    assert [p.prompt_id for p in PromptOrder(prompts, seed, shuffle).take(last)] == dealt[-n:]


def test_order_depends_on_seed_and_epoch():
    prompts = [Prompt(str(i), (i,)) for i in range(50)]

    def epoch(seed, e, shuffle=True):
        return [p.prompt_id for p in PromptOrder(prompts, seed, shuffle).take(range(50 * e, 50 * e + 50))]

    assert epoch(0, 0) == epoch(0, 0)
    assert len({tuple(epoch(s, e)) for s in (0, 1) for e in (0, 1)}) == 4
    assert epoch(0, 3, False) == [p.prompt_id for p in prompts]


def config(**sections):
    return make_config("a", "b", rollout={"prompts_per_step": 3, "rollouts_per_prompt": 2}, **sections)


def test_rollout_specs_number_the_whole_run():
    order = PromptOrder(PROMPTS, 0, False)
    specs = rollout_specs(order, config(), range(6, 9))
    assert [s.rollout_id for s in specs] == [12, 13, 14, 15, 16, 17]
    assert [s.prompt_id for s in specs] == ["1", "1", "2", "2", "3", "3"]  # prompts 6, 7, 8 of 5
    assert specs[0].prompt_ids == (1,)
    assert not any(s.probe for s in specs)  # rule none has no probes


def test_rollout_seeds_are_stable_and_differ():
    order = PromptOrder(PROMPTS, 0, False)
    seeds = [s.seed for step in range(50) for s in rollout_specs(order, config(), range(3 * step, 3 * step + 3))]
    assert len(set(seeds)) == len(seeds) == 300
    assert all(0 <= s < 2**31 for s in seeds)
    # numpy.random.SeedSequence([0, 2, i]).generate_state(1)[0] >> 1: the same on every machine and in every version
    assert seeds[:3] == [1570558271, 980773882, 712700084]
    other = [s.seed for s in rollout_specs(order, config(run={"seed": 1}), range(3))]
    assert not set(other) & set(seeds)


def test_probes_are_drawn_with_their_share_and_nested():
    order = PromptOrder(PROMPTS, 0, False)

    def probes(share):
        kat = {"rule": "kat", "probe_share": share, "calibrate_on": "all"}
        big = make_config("a", "b", rollout={"prompts_per_step": 2000}, termination=kat)
        specs = rollout_specs(order, big, range(2000, 4000))
        # probes are drawn from a stream of their own: their sampling seeds are like everybody's
        low = sum(s.seed < 2**30 for s in specs if s.probe)
        assert share in (0, 1) or 0.35 < low / sum(s.probe for s in specs) < 0.65
        return {s.rollout_id for s in specs if s.probe}

    tenth, third = probes(0.1), probes(0.3)
    # binomial, 2000 draws: standard deviations 13.4 and 20.5, so five of them
    assert abs(len(tenth) - 200) < 68 and abs(len(third) - 600) < 103
    assert tenth < third
    assert len(probes(1.0)) == 2000 and not probes(0.0)
    big = make_config("a", "b", rollout={"prompts_per_step": 2000}, termination={"rule": "kat", "probe_share": 0.3})
    assert {
        s.rollout_id for s in rollout_specs(order, big, range(2000, 4000), StepStart(None, None, 0.1)) if s.probe
    } == tenth
