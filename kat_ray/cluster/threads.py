"""How many threads the processes of a role compute with. Left out: which cores they run on."""

from __future__ import annotations

from kat_ray.config import Config
from kat_ray.config.cluster import PlacementConfig


def threads_of(config: Config, cores: int | None) -> dict[str, int]:
    """Threads of a replica, by role: `threads` where it is given.

    Else a role's replicas divide `cores`, those of the one machine that all of them are on, with whoever works at
    the same time: samplers and scorers with each other, and with the learner where steps are sampled ahead. `cores`
    is None on a cluster that others may use: there a replica has as many as the CPUs it reserves, as has one that
    works on a GPU. With `run.deterministic` it is one: last bits depend on the number, and would on the machine.
    """
    sizes: dict[str, tuple[PlacementConfig, int]] = {
        "learner": (config.learner, config.learner.world_size),
        "sampler": (config.sampler, config.sampler.bounds[1]),
    }
    sizes |= {group.role: (group.scorer, group.scorer.bounds[1]) for group in config.scorer_groups}
    on_cores = {name: n for name, (role, n) in sizes.items() if not role.num_gpus}

    def unset(name: str, role: PlacementConfig) -> int:
        if config.run.deterministic:
            return 1
        if cores is None or name not in on_cores:
            return max(1, int(role.num_cpus))
        beside = [n for other, n in on_cores.items() if config.rollout.staleness or _together(name, other)]
        return max(1, cores // sum(beside))

    found = {name: role.threads or unset(name, role) for name, (role, _) in sizes.items()}
    return found if not config.used_teachers else found | {"monitor": config.monitor.threads or 1}


def _together(name: str, other: str) -> bool:
    return (name == "learner") == (other == "learner")
