"""The section `objective`: weights by the step."""

import textwrap
from pathlib import Path

import pytest
import yaml

import kat_ray
from kat_ray.config import ObjectiveConfig

PAGE = Path(kat_ray.__file__).parents[1] / "docs" / "rl.md"


def test_a_weight_goes_in_a_straight_line_and_stays():
    opd = {"weight": 1.0, "final_weight": 0.1, "anneal_steps": 3}
    objective = ObjectiveConfig.model_validate({"opd": opd, "rl": {"weight": 2.0}})
    assert [objective.opd.weight_at(s) for s in range(5)] == pytest.approx([1.0, 0.7, 0.4, 0.1, 0.1])
    assert objective.weights_at(3) == {"opd": 0.1, "rl": 2.0} and objective.is_annealed
    assert not ObjectiveConfig().is_annealed and ObjectiveConfig().weights_at(7) == {"opd": 1.0, "rl": 0.0}


def test_a_weight_may_reach_zero_while_the_other_does_not():
    away = {"weight": 1.0, "final_weight": 0.0, "anneal_steps": 4}
    for rl in ({"weight": 1.0}, {"weight": 1.0, "final_weight": 0.5, "anneal_steps": 2}):
        assert ObjectiveConfig.model_validate({"opd": away, "rl": rl}).opd.weight_at(4) == 0.0
    with pytest.raises(ValueError, match="both 0 after 9 steps"):
        ObjectiveConfig.model_validate({"opd": away, "rl": away | {"anneal_steps": 9}})


def test_a_bound_of_the_ratio_lies_outside_of_the_clip():
    with pytest.raises(
        ValueError, match=r"dual_clip = 1\.05: lies within clip = \[0\.2, 0\.28\], .* at least 1\.28"
    ):
        ObjectiveConfig.model_validate({"rl": {"dual_clip": 1.05}})
    for rl in ({"dual_clip": 1.28}, {"dual_clip": None}, {"dual_clip": 1.05, "loss": "reinforce"}):
        ObjectiveConfig.model_validate({"rl": rl})


def test_gspo_has_the_mean_over_rollouts():
    assert ObjectiveConfig.model_validate({"rl": {"loss": "gspo"}}).rl.aggregate == "sequence_mean"
    same = {"rl": {"loss": "gspo", "aggregate": "sequence_mean"}}
    assert ObjectiveConfig.model_validate(same).rl.aggregate == "sequence_mean"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("advantage", "grpo", "advantage = 'grpo': must be 'rloo' or 'dr_grpo' with cut_reward = 'probe_weighted'"),
        ("aggregate", "token_mean", "aggregate = 'token_mean': must be 'sequence_sum' or 'constant' with"),
        ("filter_constant_groups", True, "filter_constant_groups = true: must be false with"),
    ],
)
def test_weighted_probes_are_for_sums_of_rewards(field, value, said):
    allowed = {"cut_reward": "probe_weighted", "advantage": "rloo", "aggregate": "sequence_sum"}
    assert ObjectiveConfig.model_validate({"rl": allowed}).rl.cut_reward == "probe_weighted"
    with pytest.raises(ValueError, match=said):
        ObjectiveConfig.model_validate({"rl": allowed | {field: value}})


def test_the_preset_of_the_page_is_dapo():
    block = PAGE.read_text().split("DAPO (arXiv 2503.14476):\n\n")[1].split("\n\n")[0]
    rl = ObjectiveConfig.model_validate(yaml.safe_load(textwrap.dedent(block))["objective"]).rl
    assert (rl.clip, rl.dual_clip, rl.aggregate, rl.filter_constant_groups) == (
        (0.2, 0.28),
        None,
        "token_mean",
        True,
    )
    assert (rl.overlong.buffer, rl.overlong.factor) == (128, 1.0) and rl.max_num_gen_batches > 1
