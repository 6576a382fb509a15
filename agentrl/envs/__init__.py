"""Environments: what a policy acts in. Needs no accelerator, no jax."""

from __future__ import annotations

from agentrl.envs.base import ENVIRONMENTS
from agentrl.envs.base import Environment
from agentrl.envs.base import Episode
from agentrl.envs.base import Observation
from agentrl.envs.base import make
from agentrl.envs.tool_env import ToolEnvironment

__all__ = ['ENVIRONMENTS', 'Environment', 'Episode', 'Observation', 'ToolEnvironment', 'make']
