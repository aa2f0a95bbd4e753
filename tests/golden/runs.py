"""Two deterministic runs and what is compared of them to the bit: `python -m tests.golden.runs` records them anew.

`stub` has stub engines and the real learner; `demo` is the first 20 steps of the embedded task with real engines.
What lies beside this file was recorded at commit 3aa4268, before the packages were laid out, and once more at
4575ba1, which gave the same to the bit, on a processor of the same name that rounds otherwise: the records of a run
are what users rely on, whatever happens to the code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from actors.cluster.samplers import Engines
from actors.driver.train import train
from actors.testing.stub_engine import fast_stub_engine
from actors.testing.stub_teacher import stub_teacher
from kat_ray.config import Config
from kat_ray.config.load import load_config
from kat_ray.records.traces import read_traces
from tests.support.environment import VARIABLES
from tests.support.models import write_job_files

FOLDER = Path(__file__).parent
# Of metrics: a clock or the machine decides them.
CLOCKED = ("time", "throughput/", "store/", "transfer/", "learner/seconds")
STEPS = {"stub": 6, "demo": 20}


def stub_config(root: Path) -> Config:
    """Two of everything, KAT, probes, evaluation, staleness 0; models and prompts are written below `root`."""
    write_job_files(root)
    return Config.model_validate(
        {
            "run": {
                "dir": str(root / "runs"), "steps": STEPS["stub"], "tensorboard": False, "deterministic": True,
                "checkpoint_every": 3,
            },
            "student": {"path": str(root / "student"), "dtype": "float32"},
            "teacher": {"path": str(root / "teacher"), "dtype": "float32"},
            "data": {"path": str(root / "prompts.jsonl")},
            "rollout": {
                "prompts_per_step": 8, "rollouts_per_prompt": 2, "max_tokens": 48, "chunk_tokens": 4,
                "max_chunks_ahead": 1, "top_k_logprobs": 16,
            },
            "termination": {
                "rule": "kat", "window": 8, "exempt": 4, "consecutive": 2, "eta": 0.5, "buffer": 32,
                "min_samples": 12, "min_steps": 1, "probe_share": 0.25,
            },
            "sampler": {"replicas": 2, "kv_cache_gib": 0.05, "num_cpus": 0.5, "max_num_seqs": 64},
            "scorer": {"replicas": 2, "num_cpus": 0.5},
            "learner": {"world_size": 2, "dtype": "float32", "lr": 1e-3, "num_cpus": 0.5},
            "guards": {"logprob_diff": None, "tail_mass": None},  # a stub engine's top k is no model's
        }
    )  # fmt: skip


def demo_config(root: Path) -> Config:
    """The embedded task for 20 steps, on one thread a process, with the rule that it had when this was recorded."""
    overrides = [
        f"run.dir={root}", f"run.steps={STEPS['demo']}", "run.deterministic=true", "run.tensorboard=false",
        "learner.threads=1", "evaluation.data.limit=20", "evaluation.teacher=false",
        "termination={rule: kat, window: 16, exempt: 8, consecutive: 4, eta: 0.3, buffer: 64, min_samples: 64, "
        "min_steps: 2, probe_share: 0.1}",
    ]  # fmt: skip
    return load_config("demo", overrides)


def run(name: str, root: Path) -> Path:
    """Train; returns the run's directory."""
    if name == "stub":
        return train(stub_config(root), engines=Engines(fast_stub_engine, stub_teacher))
    return train(demo_config(root))


def machine() -> dict[str, str]:
    """What the last bits of floating-point sums depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "processor": " ".join(fields.get(k, "?") for k in ("vendor_id", "cpu family", "model", "stepping")),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "arithmetic": _arithmetic(),
    }


def _arithmetic() -> str:
    """A digest of a few products and sums in float32: two processors of one model have given others.

    Libraries choose their kernels by what a virtual machine shows of its caches and instructions.
    """
    threads, found = torch.get_num_threads(), hashlib.sha256()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((7, 32, 64), (48, 64, 160), (300, 64, 32), (300, 160, 64)):
        left, right = (torch.randn(shape, generator=generator) for shape in ((rows, inner), (inner, columns)))
        for product in (left @ right, left @ right.clone().T.contiguous().T, (right.T @ left.T).softmax(dim=-1)):
            found.update(product.contiguous().numpy().tobytes())
            found.update(product.exp().sum(dim=-1).log().numpy().tobytes())
    torch.set_num_threads(threads)
    return found.hexdigest()[:16]


def record(path: Path, steps: int) -> dict[str, Any]:
    """All that must not change of the run in `path`, as JSON."""
    lines = _lines(path / "metrics.jsonl")
    last = path / "checkpoints" / f"step-{steps}"
    state = json.loads((last / "training" / "state.json").read_text())
    return {
        "machine": machine(),
        "metrics": [{k: v for k, v in line.items() if not k.startswith(CLOCKED)} for line in lines],
        "evaluations": _lines(path / "evaluations.jsonl"),
        "traces": [_trace(row) for row in read_traces(path).to_pylist()],
        "calibration": state["rule"],
        "weights": {name: _digest(array) for name, array in sorted(load_file(last / "model.safetensors").items())},
        "weight_sums": {
            name: float(np.abs(array).sum(dtype=np.float64))
            for name, array in sorted(load_file(last / "model.safetensors").items())
        },
    }


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _trace(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the traces; its long columns as digests, and their sums."""
    short = {k: v for k, v in row.items() if not isinstance(v, list)}
    return short | {
        name: [len(v), _digest(np.asarray(v)), float(np.nansum(np.asarray(v, dtype=np.float64)))]
        for name, v in row.items()
        if isinstance(v, list)
    }


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def differences(found: Any, golden: Any, *, exact: bool, where: str = "") -> list[str]:
    """Where two records differ, at most ten places. Not `exact`: digests are left out, numbers agree to 1 %."""
    if isinstance(golden, Mapping):
        keys = {*golden, *(found if isinstance(found, Mapping) else ())}
        parts = [
            differences(_get(found, k), _get(golden, k), exact=exact, where=f"{where}/{k}") for k in sorted(keys)
        ]
        return [line for part in parts for line in part][:10]
    if isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        pairs = enumerate(zip(found, golden, strict=True))
        parts = [differences(f, g, exact=exact, where=f"{where}[{i}]") for i, (f, g) in pairs]
        return [line for part in parts for line in part][:10]
    if found == golden or (isinstance(found, float) and isinstance(golden, float) and math.isnan(found + golden)):
        return []
    if not exact and isinstance(golden, int | float) and isinstance(found, int | float):
        if math.isclose(found, golden, rel_tol=1e-2, abs_tol=1e-6):
            return []
    elif not exact and isinstance(golden, str) and len(golden) == 16 and isinstance(found, str):
        return []
    return [f"{where}: {found!r}, recorded {golden!r}"]


def _get(tree: Any, key: str) -> Any:
    return tree.get(key, "(nothing)") if isinstance(tree, Mapping) else tree


def compare(name: str, found: dict[str, Any]) -> list[str]:
    """Differences from what was recorded: to the bit on a machine of the same kind, else as far as numbers go.

    Sums in another order change last bits. With real engines that sooner or later changes a token, and all that
    come after it: on another kind of machine the first step is compared. A metric that is newer than the recording
    is left out, and so is a column of the traces that is newer, as long as it is empty.
    """
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    known = {name for line in golden["metrics"] for name in line}
    found["metrics"] = [{k: v for k, v in line.items() if k in known} for line in found["metrics"]]
    columns = {name for row in golden["traces"] for name in row}
    found["traces"] = [{k: v for k, v in row.items() if k in columns or v is not None} for row in found["traces"]]
    exact = found.pop("machine") == golden.pop("machine")
    for part in ("metrics", "evaluations"):
        found[part] = [_without_new(line, golden[part]) for line in found[part]]
    if name == "demo" and not exact:
        found, golden = _first_step(found), _first_step(golden)
    return differences(found, golden, exact=exact)


def _without_new(line: Mapping[str, Any], recorded: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A line without what no line had when the run was recorded."""
    known = {name for other in recorded for name in other}
    return {name: value for name, value in line.items() if name in known}


def _first_step(record: dict[str, Any]) -> dict[str, Any]:
    first = next(line for line in record["metrics"] if "learner/loss" in line)
    return {name: first[name] for name in ("kl/mean", "rollout/mean_length", "learner/loss", "health/overlap")}


def main(arguments: list[str]) -> int:
    """Record or compare: exit code 1 where a run differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.runs", description=__doc__)
    parser.add_argument("names", nargs="+", choices=sorted(STEPS))
    parser.add_argument("--record", action="store_true", help="write what was found instead of comparing it")
    options = parser.parse_args(arguments)
    os.environ.update(VARIABLES)
    code = 0
    for name in options.names:
        with tempfile.TemporaryDirectory() as folder:
            found = record(run(name, Path(folder)), STEPS[name])
        if options.record:
            (FOLDER / f"{name}.json").write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")
            continue
        different = compare(name, found)
        print(f"{name}: " + ("as recorded" if not different else "differs\n  " + "\n  ".join(different)))
        code = max(code, bool(different))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
