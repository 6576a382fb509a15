"""GRPO: what most other methods here are compared with.

Exact: z-scores of the final reward within the group, population deviation; token ratios, clip 0.2.
Ours: the mean over all tokens, as verl takes it (the paper: over trajectories of means over tokens), and no KL
penalty (the paper's 0.04 is recalled; agentic forks take 0.001 or 0).

    python -m agentrl.main --config=configs/methods/grpo.py --workdir=runs/grpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='GRPO',
    source='arXiv 2402.03300; settings of agentic forks',
    exact='z-score in the group, clip 0.2',
    ours='mean over tokens, no KL penalty',
    test='tests/algorithms/objective_test.py',
    claim=dict(metric='seconds', better='lower', than='ppo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.algorithm = 'grpo'
  return c
