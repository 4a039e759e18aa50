"""The engine: TRL's GRPO step, opened at its joints."""

from .config import MethodConfig, MixingError
from .mixing import mix
from .rollouts import Requests, Rollouts, Scored, TokenBatch
from .trainer import MethodTrainer


__all__ = [
    "MethodConfig",
    "MethodTrainer",
    "MixingError",
    "Requests",
    "Rollouts",
    "Scored",
    "TokenBatch",
    "mix",
]
