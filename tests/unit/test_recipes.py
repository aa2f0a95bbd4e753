"""The recipes of docs/recipes, before a run: what `kat-ray doctor` finds on the hardware that the page names.

Models and data are stand-ins of the true sizes and columns (`tests/support/recipes.py`), and the GPUs are said to
be there. Golds are integers here, and read as such: math-verify would take a process for each held-out set. Two
steps on engines: tests/cluster/test_recipes.py.
"""

import pytest

from kat_ray.cli import doctor
from kat_ray.cli.checks import resources
from kat_ray.config.load import load_config
from kat_ray.models.inspect import check_models
from kat_ray.models.memory import GIB, memory_needed
from tests.support.recipes import FOLDER, RECIPES, kept_bytes, parameters_of, stand_ins

# GPUs and their memory as torch sees it, by recipe; those that are not named run on CPUs.
NODE = (8, 79 * GIB)
HARDWARE = {
    "kat-qwen3-1.7b": NODE, "kat-qwen3-4b": NODE, "dapo": NODE, "opd-rl": NODE, "lora-24gb": (1, 22 * GIB),
    "self-distillation-gsm8k": (1, 79 * GIB),
}  # fmt: skip
PAGES = {"kat-qwen3-4b": "kat-qwen3", "kat-qwen3-1.7b": "kat-qwen3"}  # two recipes on one page
IDS = [path.stem for path in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_a_recipe_is_a_configuration_with_a_page(recipe):
    assert load_config(recipe).run.name == recipe.stem
    page = FOLDER / f"{PAGES.get(recipe.stem, recipe.stem)}.md"
    text, place = page.read_text(), f"docs/recipes/{recipe.name}"
    assert f"kat-ray doctor {place}" in text and f"kat-ray train {place}" in text
    assert f"]({page.name})" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_doctor_finds_nothing_wrong_on_the_hardware_of_the_page(recipe, tmp_path, monkeypatch):
    plain = load_config(recipe)
    if plain.environment is not None:
        pytest.importorskip("reasoning_gym", reason="the extra reasoning-gym is not installed")
    read = [
        f"{s}.verifier=integer"
        for s in ("evaluation", *(f"evaluation.sets.{n}" for n in plain.evaluation.sets))
        if plain.environment is None
    ]
    config = load_config(recipe, [*stand_ins(plain, tmp_path), *read])
    gpus, memory = HARDWARE.get(recipe.stem, (0, None))
    monkeypatch.setattr(doctor, "gpu_memory", lambda: memory)
    monkeypatch.setattr(doctor, "free_memory", lambda: 16 * GIB)
    checks = [*doctor._settings(config), *resources(config, 64, gpus), *doctor._models_and_data(config)]
    said = {check.name: str(check) for check in checks}
    assert [str(check) for check in checks if check.level == "FAIL" or "will not fit" in check.text] == []
    asked = "GPU memory" if gpus else "memory"
    assert said[asked].startswith(f"ok    {asked}"), "the learner's memory was estimated"
    assert "GPUs" in said if gpus else "GPUs" not in said
    if plain.teacher is not None and plain.used_teachers:
        assert said["tokenizers"] == "ok    tokenizers: equal"


def test_what_shares_one_gpu_fits_into_it(tmp_path):
    """Weights, keys and values of what is in flight, and half a GiB for each process beside them."""
    plain = load_config(FOLDER / "lora-24gb.yaml")
    config = load_config(FOLDER / "lora-24gb.yaml", stand_ins(plain, tmp_path))
    _, memory = HARDWARE["lora-24gb"]
    longest = 256 + config.rollout.max_tokens
    ((_, needed, _),) = memory_needed(config, check_models(config), longest, memory)
    assert needed + GIB / 2 < memory
    for role, model in ((config.sampler, plain.student), (config.scorer, plain.teacher)):
        held = config.sampler.max_num_seqs * longest * kept_bytes(model.path)
        assert 2 * parameters_of(model.path) + held + GIB / 2 < role.gpu_memory_utilization * memory
    assert sum(role.num_gpus for role in (config.sampler, config.scorer, config.learner)) == 1
