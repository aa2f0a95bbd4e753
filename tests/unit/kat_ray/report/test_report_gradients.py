"""The stages' gradients in a run's report: by hand, of the demo's models, and where the data is gone."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kat_ray.cli import main as cli
from kat_ray.config.load import load_config
from kat_ray.models.inspect import resolve_model
from kat_ray.report.gradients import bases_of, groups_of, projected
from tests.support.reports import STAGES, row, small_run, write_run


@pytest.fixture
def two_checkpoints(tmp_path):
    """The demo's student, and the same moved along one direction in each matrix."""
    first = Path(resolve_model(load_config("demo", []).student))
    shutil.copytree(first, tmp_path / "last")
    weights = load_file(first / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.ndim == 2 and "layers" in name:
            weight += 0.01 * torch.outer(*(torch.randn(n, generator=generator) for n in weight.shape))
    save_file(weights, tmp_path / "last" / "model.safetensors", metadata={"format": "pt"})
    return str(first), str(tmp_path / "last")


@pytest.mark.integration
def test_gradients_of_the_demo_models(tmp_path, two_checkpoints):
    run = small_run(tmp_path)
    assert cli.main(["report", str(run), "--gradients", *two_checkpoints]) == 0
    html = (run / "report" / "report.html").read_text()
    table = re.search(r'<h2 id="gradients">.*?<table>(.*?)</table>', html, re.DOTALL).group(1)
    heading, *lines = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in table.split("</tr>")[:-1]]
    assert heading[:3] == ["stage", "tokens", "gradient norm"] and len(heading) == 5
    assert [line[:2] for line in lines] == [["before", "3"], ["agreement", "5"], ["after", "3"]]
    shares = [float(cell.rstrip("%")) for line in lines for cell in line[3:]]
    assert all(0 < share < 100 for share in shares) and all(float(line[2]) > 0 for line in lines)
    assert len(set(shares)) == len(shares), "each stage has a gradient of its own"


def test_gradients_of_a_run_whose_data_changed(tmp_path, capsys, two_checkpoints):
    run = write_run(tmp_path / "run", [[row(0, STAGES, would_cut=3, prompt_id="train:gone")]])
    assert cli.main(["report", str(run), "--gradients", *two_checkpoints]) == 2
    assert "prompt train:gone, which data.path" in capsys.readouterr().err


def test_gradient_shares_by_hand():
    # The update has rank 1 in the direction e0 f0; r = 1 for a 16 x 16 matrix.
    before = {
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 16),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(16, 32),
    }
    before["model.layers.0.norm.weight"] = torch.zeros(16)
    after = {name: weight.clone() for name, weight in before.items()}
    after["model.layers.0.self_attn.q_proj.weight"][0, 3] = 2.0
    after["model.layers.0.mlp.up_proj.weight"][1, 1] = 1.0
    bases = bases_of(before, after)
    assert set(groups_of(bases)) == {"attention", "last MLP"} and len(bases) == 2
    basis = bases["model.layers.0.self_attn.q_proj.weight"]
    gradient = torch.zeros(16, 16)
    gradient[0, 3], gradient[5, 5] = 3.0, 4.0
    assert projected(gradient, basis) == pytest.approx(9.0) and gradient.square().sum() == 25
    assert projected(torch.roll(gradient, 1, 0), basis) == pytest.approx(0.0)
    random = torch.randn(400, 16, 16, generator=torch.Generator().manual_seed(0))
    mean = np.mean([projected(g, basis) / float(g.square().sum()) for g in random])
    assert mean == pytest.approx(1 / 256, rel=0.3), "r^2 / (m n) by chance"
    assert not math.isnan(mean)
