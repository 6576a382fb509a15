"""Policy-optimisation algorithms: pure functions on arrays, and objectives composed of them.

    objective = OBJECTIVES.get('grpo')(clip_high=.28)

A new objective is one file here that registers a factory; `compose.py` and `choices.py` hold what
it is put together from, `objective.py` how it is used.
"""

from __future__ import annotations

from agentrl.core.registry import Registry

OBJECTIVES = Registry('objective', package='agentrl.algorithms')
