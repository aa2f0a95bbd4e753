"""Which data types a processor is slow in."""

import pytest

from kat_ray.models.cpu_dtypes import cpu_flags, slow_dtypes
from tests.support.configs import make_config

AVX2 = frozenset({"avx2", "fma"})


def lines(flags=AVX2, learner=None, **dtypes):
    """`dtypes`: of student and teacher."""
    config = make_config("s", "t", learner=learner or {})
    models = {name: getattr(config, name).model_copy(update={"dtype": dtype}) for name, dtype in dtypes.items()}
    return list(slow_dtypes(config.model_copy(update=models), flags))


def test_a_processor_without_the_arithmetic_is_told_with_the_fields():
    assert lines() == [], "float32 everywhere"
    (line,) = lines(learner={"dtype": "bfloat16"}, teacher="bfloat16")
    assert line.startswith("teacher.dtype, learner.dtype = bfloat16 without a GPU") and "use float32" in line
    both = lines(learner={"dtype": "bfloat16"}, student="float16")
    assert [line.split(" without")[0] for line in both] == ["learner.dtype = bfloat16", "student.dtype = float16"]


@pytest.mark.parametrize("flags", [AVX2 | {"amx_bf16"}, AVX2 | {"avx512_bf16"}, frozenset({"bf16"}), None])
def test_a_processor_with_it_or_unknown_is_left_alone(flags):
    assert lines(flags, learner={"dtype": "bfloat16"}) == []


def test_a_role_on_a_gpu_is_left_alone():
    assert lines(learner={"dtype": "bfloat16", "num_gpus": 1}) == []


def test_flags_are_read(tmp_path):
    file = tmp_path / "cpuinfo"
    assert cpu_flags(file) is None
    file.write_text("processor\t: 0\n\n")
    assert cpu_flags(file) is None
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t: fpu\n")
    assert cpu_flags(file) == {"fpu", "avx2", "fma"}
