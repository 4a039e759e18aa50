"""Data and rewards to train on: an embedded task with a tiny policy, reasoning_gym, local files and the Hub."""

from .data import ReasoningGymReward, Task, load_data, load_rewards
from .embedded import CHAIN_SUM_CONFIG, POLICY_PATH, arithmetic, exact_match


__all__ = [
    "CHAIN_SUM_CONFIG",
    "POLICY_PATH",
    "ReasoningGymReward",
    "Task",
    "arithmetic",
    "exact_match",
    "load_data",
    "load_rewards",
]
