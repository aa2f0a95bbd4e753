"""Configurations of tests."""

# Rewards alone: nobody asks a teacher.
ALONE = {
    "objective": {"opd": {"weight": 0.0}, "rl": {"weight": 1.0}},
    "rollout": {"rollouts_per_prompt": 4, "top_p": 1.0},
}


def make_config(student, teacher, **sections):
    """A Config for two model directories."""
    from kat_ray.config import Config

    base = {
        "student": {"path": student, "dtype": "float32"},
        "teacher": {"path": teacher, "dtype": "float32"},
        "data": {"path": "unused.jsonl"},
        "termination": {"rule": "none"},
        "learner": {"dtype": "float32"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return Config.model_validate(base)
