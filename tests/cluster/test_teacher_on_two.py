"""A teacher on two devices of one node, where Ray places it: vLLM's CPU build has tensor parallelism too."""

import psutil
import pytest
import ray

from actors.cluster.placement import Placement
from actors.cluster.replica import remote_class
from actors.teacher.settings import ScorerSettings
from tests.deploy.ray_process import agent_port_of_its_own, until
from tests.support.chunks import chunk_of, random_rollouts
from tests.support.configs import make_config

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("own_ray")]


class Probe:
    """The teacher of a scorer; only the V2 runner, which a CPU has not, is not asked for its scores."""

    def __init__(self, settings):
        from vllm.config import VllmConfig

        from actors.teacher.vllm_backend import VllmTeacher
        from actors.teacher.vllm_engine import start_engine

        engine = start_engine(settings, kv_cache_memory_bytes=2**25, enforce_eager=True)
        VllmConfig.use_v2_model_runner = True
        self.teacher, self.engine = VllmTeacher(settings, engine), engine

    def ask(self, chunk):
        """How the engine runs, and the tokens that it ran for a chunk's requests, which its front door took."""
        asks = self.teacher._asks(chunk, self.teacher._with_chunk(chunk), chunk.topk_ids())
        self.teacher._ask(asks)
        parallel = self.engine.vllm_config.parallel_config
        processes = [p.pid for p in psutil.Process().children(recursive=True)]
        return (
            parallel.tensor_parallel_size,
            parallel.distributed_executor_backend,
            processes,
            self.teacher.run_tokens,
        )


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_teacher_on_two_devices_starts_where_ray_places_it(models):
    config = make_config(
        models["student"][0], models["teacher"][0],
        scorer={"num_gpus": 2, "tensor_parallel_size": 2, "cache_block": 32, "num_cpus": 1},
    )  # fmt: skip
    settings = ScorerSettings.from_config(config, models["teacher"][0], (1, 5), 256)
    chunk = chunk_of(models["student"][1], random_rollouts(3, tokens=(20, 21)))
    with agent_port_of_its_own():
        ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, namespace="kat-ray",
                 object_store_memory=150 * 2**20, log_to_driver=False)  # fmt: skip
    try:
        placement = Placement(config, True, "two", only=["scorer"])
        (place,) = placement.places("scorer")
        options = placement.options("scorer", 0, place)
        # On a CPU vLLM would bind each process to a NUMA node of its own.
        options["runtime_env"]["env_vars"]["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        probe = remote_class(Probe).options(**options).remote(settings)
        size, executor, processes, run = ray.get(probe.ask.remote(chunk), timeout=500)
        assert (size, executor) == (2, "mp") and len(processes) >= 2
        assert run == chunk.tokens + len(chunk.context_ids), "each token once: nothing was cached"
        ray.kill(probe)
        until(lambda: not any(map(runs, processes)), 120, "the engine's processes end with their actor")
    finally:
        ray.shutdown()
