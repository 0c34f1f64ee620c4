"""Configuration: models with types and units, YAML, overrides, one-line errors. Imports neither torch nor megatron."""

from engine.config.adamw import AdamWConfig
from engine.config.base import Problem, Section, build, option
from engine.config.command_line import parse
from engine.config.data import BlendChange, BlendEntry, DataConfig
from engine.config.loading import load_config
from engine.config.model import Llama3RopeConfig, ModelConfig, MoEConfig, YarnConfig
from engine.config.parameters import count as parameter_count
from engine.config.parameters import padded_vocab_size, vocabulary
from engine.config.presets import PRESETS
from engine.config.schema import STAGES, Config
from engine.config.sections import (
    BatchSizeSchedule,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    MuonConfig,
    ParallelConfig,
    SeqLengthStage,
    TrainConfig,
)
from engine.config.stages import DpoConfig, ExamplesConfig, LoraConfig, Source
from engine.config.yaml_io import dump_yaml, load_yaml

__all__ = [
    "PRESETS",
    "STAGES",
    "AdamWConfig",
    "BatchSizeSchedule",
    "BlendChange",
    "BlendEntry",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DpoConfig",
    "EvaluationConfig",
    "ExamplesConfig",
    "Llama3RopeConfig",
    "LoggingConfig",
    "LoraConfig",
    "MoEConfig",
    "ModelConfig",
    "MuonConfig",
    "ParallelConfig",
    "Problem",
    "Section",
    "SeqLengthStage",
    "Source",
    "TrainConfig",
    "YarnConfig",
    "build",
    "dump_yaml",
    "load_config",
    "load_yaml",
    "option",
    "padded_vocab_size",
    "parameter_count",
    "parse",
    "vocabulary",
]
