"""A tool that does nothing itself: calling it tells the agent to forget."""

from __future__ import annotations

from typing import Any, Mapping

from agentrl.core import types
from agentrl.tools import base


@base.TOOLS.register('prune')
class Prune(base.Tool):
  """Answers that older exchanges are forgotten; agent 'context_segments' sees to it."""

  name = 'prune'
  description = 'Forgets what was found, but the latest.'
  parameters = {'type': 'object', 'properties': {'note': {'type': 'string'}}, 'required': [],
                'additionalProperties': False}

  async def call(self, state: None, arguments: Mapping[str, Any]) -> types.ToolResult:
    """Returns 'ok'."""
    return base.success('ok')
