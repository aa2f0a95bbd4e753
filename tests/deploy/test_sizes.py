"""The profiles for GPUs: every replica finds room, on a GPU as the memory plan has it and in its pod's memory."""

import re

import pytest

from kat_ray.cluster.roles import Node, place, roles_of
from kat_ray.models.memory import GIB, learner_bytes
from tests.deploy.manifests import Manifest, job_config, ray_cluster, render

ON_GPUS = ["run", "queue", "node", "teacher-70b"]
PARAMETERS = {  # of the models' own files
    "Qwen3-1.7B-Base": 2.03e9, "Qwen3-4B-Base": 4.02e9, "Qwen3-8B": 8.19e9, "Qwen2.5-7B": 7.62e9,
    "Qwen2.5-72B-Instruct": 72.7e9,
}  # fmt: skip
GPU = 80 * GIB
PROCESS = 6 * GIB  # of a Ray worker with torch, CUDA and an engine, its weights apart
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": GIB, "Ti": 2**40}


def bytes_of(quantity: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([KMGT]i)", quantity).groups()
    return float(number) * UNITS[unit]


def parameters(path: str) -> float:
    return PARAMETERS[path.rsplit("/", 1)[-1]]


def pod_sizes(group: Manifest) -> tuple[float, float]:
    """Bytes of a pod's memory, and of that /dev/shm."""
    spec = group["template"]["spec"]
    (shm,) = [v["emptyDir"]["sizeLimit"] for v in spec["volumes"] if v["name"] == "shm"]
    return bytes_of(spec["containers"][0]["resources"]["limits"]["memory"]), bytes_of(shm)


@pytest.fixture(params=ON_GPUS)
def profile(request, tmp_path):
    docs = render(request.param)
    config = job_config(docs, tmp_path)
    return config, {g["groupName"]: g for g in ray_cluster(docs)["workerGroupSpecs"]}


@pytest.mark.parametrize("most", [False, True])
def test_every_replica_finds_a_node(profile, most):
    config, groups = profile
    if most:
        grown = {r: {"replicas": getattr(config, r).bounds[1]} for r in ("sampler", "scorer")}
        config = config.model_copy(update={r: getattr(config, r).model_copy(update=u) for r, u in grown.items()})
    nodes = [Node("head", {"head": 1.0}, {"kat.ray/role": "head"})]
    for name, group in groups.items():
        has = {k: float(v) for k, v in group["resources"].items()}
        count = group["maxReplicas" if most else "replicas"]
        nodes += [Node(f"{name}-{n}", has, group["labels"]) for n in range(count)]
    for found in place(list(roles_of(config).values()), nodes):
        assert not found.lacking, f"{found.role.name}: {found.lacking}"


def test_models_fit_their_gpus(profile):
    config, _ = profile
    student, teacher = parameters(config.student.path), parameters(config.teacher.path)
    assert learner_bytes(config, student) < 0.8 * GPU, "with room for a micro-batch"
    for role, weights in ((config.sampler, student), (config.scorer, teacher)):
        share = role.gpu_memory_utilization * GPU * role.num_gpus
        assert 2 * weights < 0.7 * share, "with room for a KV cache"


def test_pods_hold_what_the_roles_keep(profile):
    """Weights in bfloat16 are 2 bytes a parameter; a checkpoint's copy has 12 more, divided among the ranks."""
    config, groups = profile
    student, teacher = parameters(config.student.path), parameters(config.teacher.path)
    versions = 2 * 2 * student  # in the object store: the one that is loaded, and the next
    slots = {name: int(group["resources"][name]) for name, group in groups.items()}
    ranks = slots["learner"] / config.learner.world_size
    kept = {
        "learner": slots["learner"] * (PROCESS + 2 * student) + 2 * student + 12 * student * ranks,
        "sampler": slots["sampler"] * (PROCESS + 2 * student),
        # The weights pass through the memory of the processes that load them.
        "scorer": slots["scorer"] * PROCESS * config.scorer.tensor_parallel_size + 2 * teacher,
    }
    for name, group in groups.items():
        memory, shm = pod_sizes(group)
        if name != "scorer":
            assert shm > versions, f"{name}: /dev/shm of {shm / GIB:.0f} GiB for {versions / GIB:.0f}"
        assert memory - shm > kept[name], f"{name}: {(memory - shm) / GIB:.0f} GiB for {kept[name] / GIB:.0f}"


def test_the_node_holds_its_pods(tmp_path):
    """As the profile's head says: of a machine with 8 GPUs, with some left for what a node runs beside."""
    docs = render("node")
    cluster = ray_cluster(docs)
    groups = cluster["workerGroupSpecs"]
    limits = [
        (g.get("replicas", 1), g["template"]["spec"]["containers"][0]["resources"]["limits"])
        for g in (cluster["headGroupSpec"], *groups)
    ]
    assert sum(n * int(of.get("nvidia.com/gpu", 0)) for n, of in limits) == 8
    assert sum(n * int(of["cpu"]) for n, of in limits) == 76
    assert sum(n * bytes_of(of["memory"]) for n, of in limits) == 664 * GIB
    assert not cluster["enableInTreeAutoscaling"]
