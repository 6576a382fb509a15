"""Tool-GRPO (AdaReasoner): a right answer earns full marks, a wrong one what its calls were worth.

Code ssmisya/AdaReasoner. Format broken 0, right 8, wrong the mean of the turns' scores from 0 to 4; the rubric of a
turn (structure, name, arguments, values) is recalled, not checked. Paper: 4 samples, batch 32 in 4 updates,
learning rate 1e-6, at most 10 turns.

    python -m agentrl.main --config=configs/methods/tool_grpo.py --workdir=runs/tool_grpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='Tool-GRPO',
    source='code ssmisya/AdaReasoner',
    exact='8 for a right answer, else the mean of scores up to 4, 0 for a broken format',
    ours='the scores of turns: the rubric is recalled, not checked',
    test='tests/rewards/shaping_test.py',
    claim=dict(metric='failed_call_rate', better='lower', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = ({'name': 'tool_use'}, {'name': 'tool_score', 'full': 8.0})
  return c
