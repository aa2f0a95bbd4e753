"""The configuration: one frozen tree of sections, its file format, its messages and its documentation.

`from kat_ray.config import Config` is part of the public interface; the other modules of this package are not.
"""

from kat_ray.config.cluster import (
    ClusterConfig,
    LearnerConfig,
    LoraConfig,
    MonitorConfig,
    PlacementConfig,
    PoolConfig,
    PoolsConfig,
    SamplerConfig,
    ScorerConfig,
    Section,
)
from kat_ray.config.data import DataConfig, EvaluationConfig
from kat_ray.config.environment import CurriculumConfig, EnvironmentConfig
from kat_ray.config.guards import GuardsConfig
from kat_ray.config.objective import DistillationObjective, ObjectiveConfig, PolicyObjective
from kat_ray.config.reward import RewardConfig
from kat_ray.config.sections import Config, RolloutConfig, RunConfig
from kat_ray.config.teachers import Dtype, ModelConfig, NamedTeacherConfig, ScorerGroup, TeacherConfig
from kat_ray.config.tracking import TrackerName, TrackingConfig

__all__ = [
    "ClusterConfig",
    "Config",
    "CurriculumConfig",
    "DataConfig",
    "DistillationObjective",
    "Dtype",
    "EnvironmentConfig",
    "EvaluationConfig",
    "GuardsConfig",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "MonitorConfig",
    "NamedTeacherConfig",
    "ObjectiveConfig",
    "PlacementConfig",
    "PolicyObjective",
    "PoolConfig",
    "PoolsConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplerConfig",
    "ScorerConfig",
    "ScorerGroup",
    "Section",
    "TeacherConfig",
    "TrackerName",
    "TrackingConfig",
]
