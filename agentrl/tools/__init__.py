"""Tools that a policy can call, and the executor that runs them. Needs no accelerator, no jax.

    with tools.Executor([tools.make('python'), tools.make('calculator')]) as executor:
      session = executor.open(seed=0)
      results = await session.call(calls)
"""

from __future__ import annotations

from agentrl.tools.base import TOOLS
from agentrl.tools.base import Tool
from agentrl.tools.base import make
from agentrl.tools.executor import Executor
from agentrl.tools.executor import Limits
from agentrl.tools.executor import ToolSession
from agentrl.tools.executor import ToolStats
from agentrl.tools.functions import function_tool

__all__ = ['TOOLS', 'Executor', 'Limits', 'Tool', 'ToolSession', 'ToolStats', 'function_tool',
           'make']
