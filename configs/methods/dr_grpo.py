"""Dr.GRPO: GRPO without the deviation, and without the length of a trajectory in its weight.

Exact: rewards less the group's mean; sums of token losses over the most tokens that a trajectory may sample; clip
0.2; no KL penalty.

    python -m agentrl.main --config=configs/methods/dr_grpo.py --workdir=runs/dr_grpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='Dr.GRPO',
    source='arXiv 2503.20783, code sail-sg/understand-r1-zero',
    exact='no deviation, sum over a constant length, no KL',
    ours='none',
    test='tests/algorithms/aggregation_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.algorithm = 'grpo'
  c.rl.options = ConfigDict({'advantage': 'center', 'aggregation': 'sum_over_constant',
                             'max_tokens': c.rollout.trajectory_tokens})
  return c
