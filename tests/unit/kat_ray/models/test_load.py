"""Models as transformers loads them: what it only warns of is refused."""

import pytest
from safetensors.torch import load_file, save_file

from kat_ray.config import ModelConfig
from kat_ray.errors import UserError
from kat_ray.models.load import load_causal_lm
from tests.support.models import make_model


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_not_there_are_named(tmp_path, tied):
    """transformers makes them up; a teacher's scores would be those of another model, in pieces and whole."""
    make_model(tmp_path, tied=tied)
    model = ModelConfig(path=str(tmp_path), dtype="float32")
    load_causal_lm(model, str(tmp_path), "float32", "teacher")  # a tied output layer is in no file
    file = tmp_path / "model.safetensors"
    lost = [n for n in load_file(file) if "layers.1.mlp" in n]
    save_file({n: t for n, t in load_file(file).items() if n not in lost}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"teacher\.path = .*have no weights for model\.layers\.1\.mlp\.down_proj"):
        load_causal_lm(model, str(tmp_path), "float32", "teacher")
