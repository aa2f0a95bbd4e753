"""Put models of the hub into a folder that all nodes mount: python fetch_models.py FOLDER OWNER/NAME[@REVISION]...

Each becomes FOLDER/OWNER/NAME when all of it is there; until then it lies in FOLDER/.partial, where a retry goes
on.
A model that is there is left, unless it is of another revision than the one that is asked for: that is an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

TAKEN = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "README.md"]
LEFT = ["original/*", "consolidated*", "*.bin.index.json", "onnx/*"]  # the same weights in other forms
MARK = ".revision"


def fetch(folder: Path, wanted: str) -> str:
    """Fetch one model; says what was done. SystemExit where another revision is there."""
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = wanted.partition("@")
    target, partial = folder / name, folder / ".partial" / name
    if target.is_dir():
        there = (target / MARK).read_text().split() if (target / MARK).is_file() else []
        if revision and revision not in there:
            raise SystemExit(
                f"{target}: is there, of revision {' '.join(there) or 'unknown'}, not {revision}: remove it, or "
                "ask for that one"
            )
        return f"{target}: is there"
    commit = HfApi().model_info(name, revision=revision or None).sha
    partial.mkdir(parents=True, exist_ok=True)
    snapshot_download(name, revision=commit, local_dir=partial, allow_patterns=TAKEN, ignore_patterns=LEFT)
    (partial / MARK).write_text(f"{commit} {revision}".strip() + "\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(target)
    return f"{target}: fetched, commit {commit}"


if __name__ == "__main__":
    for one in sys.argv[2:]:
        print(fetch(Path(sys.argv[1]), one), flush=True)
