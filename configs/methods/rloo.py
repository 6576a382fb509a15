"""RLOO: REINFORCE over whole sequences, each compared with the mean of the others.

Exact: advantage R less the mean of the others; loss -A times the log-likelihood of the sequence, no ratio and no
clip.
Recalled, not checked: the divergence from the reference is part of R. Ours: its weight of 0.001 a nat; groups are
the toy world's, the paper's have 2 to 4 samples (recalled).

    python -m agentrl.main --config=configs/methods/rloo.py --workdir=runs/rloo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='RLOO',
    source='arXiv 2402.14740',
    exact='leave-one-out, REINFORCE over sequences, KL in the reward',
    ours='weight 0.001 of the KL',
    test='tests/algorithms/baselines_test.py',
    claim=dict(metric='success', better='higher', than='reinforce_pp'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.reference = True
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {
      'advantage': {'name': 'rloo', 'kl_in_reward': 0.001}, 'ratio': 'off', 'clip': 'log_likelihood',
      'aggregation': 'seq_mean_tok_sum'}}})
  return c
