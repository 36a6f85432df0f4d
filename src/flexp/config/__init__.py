"""The one schema of a run: one file a table."""

from flexp.config.data import ClientConfig, ClientsConfig, Cut, DataConfig, Task
from flexp.config.deployment import DeploymentConfig
from flexp.config.devices import DeviceChange, DeviceClassConfig, DevicesConfig, RecutConfig
from flexp.config.link import Cache, CodecConfig, CodecName, LinkConfig, Rows
from flexp.config.methods import AlignConfig, MeetConfig, MethodConfig
from flexp.config.model import ComputeConfig, LoraConfig, ModelConfig, Quantization, Tuning
from flexp.config.privacy import PrivacyConfig
from flexp.config.run import EvaluationConfig, OutputConfig, RunConfig
from flexp.config.section import Beta, Bytes, Fraction, PositiveInt, Rate, Section, Seed, all_keys
from flexp.config.server import GuardConfig, ServerConfig
from flexp.config.train import OptimizerConfig, TrainConfig

__all__ = [
    "AlignConfig",
    "Beta",
    "Bytes",
    "Cache",
    "ClientConfig",
    "ClientsConfig",
    "CodecConfig",
    "CodecName",
    "ComputeConfig",
    "Cut",
    "DataConfig",
    "DeploymentConfig",
    "DeviceChange",
    "DeviceClassConfig",
    "DevicesConfig",
    "EvaluationConfig",
    "Fraction",
    "GuardConfig",
    "LinkConfig",
    "LoraConfig",
    "MeetConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "PositiveInt",
    "PrivacyConfig",
    "Quantization",
    "Rate",
    "RecutConfig",
    "Rows",
    "RunConfig",
    "Section",
    "Seed",
    "ServerConfig",
    "Task",
    "TrainConfig",
    "Tuning",
    "all_keys",
]
