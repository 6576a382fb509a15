"""HDPO (Act Wisely, Metis): accuracy and thrift optimised apart.

Exact: reward 0.9 accuracy + 0.1 format with z-scores (ddof 1) in one loss; tool reward 1 / (calls + 1) of right
answers, z-scores (ddof 1) among them alone, at least two, in another of weight 0.15 that averages over the rows
with a tool advantage; clip 0.2; no KL penalty. The paper: 16 samples, learning rate 1e-6.
Ours: that average is over the tokens of those rows.

    python -m agentrl.main --config=configs/methods/hdpo.py --workdir=runs/hdpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='HDPO',
    source='Act Wisely / Metis, code Accio-Lab/Metis',
    exact='two losses, z of the tool reward among right answers, weight 0.15',
    ours='tool loss a mean over the tokens of its rows',
    test='tests/algorithms/conditional_test.py',
    claim=dict(metric='calls_per_task', better='lower', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.weights = ConfigDict({'accuracy': 0.9, 'format': 0.1})
  c.reward.shapings = ({'name': 'tool_reward'},)
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {
      'accuracy': {'advantage': {'name': 'z', 'ddof': 1}},
      'tool': {'advantage': {'name': 'cond_z', 'part': 'tool_reward'}, 'filters': ('nonzero_adv',),
               'weight': 0.15}}})
  return c
