"""GiGPO: turns of a group that began in the same state are compared with each other.

From a page about it: A = A_E + omega A_S, omega 1, with A_S the z-score of the discounted return among the turns of
the group from one state; gamma 0.95 in ROLL's examples.
Ours: a state is a checksum of the prompt and all observations so far, because one observation of the toy world is
no state; `state_part` 'state' takes the last observation alone, as in the paper's environments.

    python -m agentrl.main --config=configs/methods/gigpo.py --workdir=runs/gigpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='GiGPO',
    source='arXiv 2505.10978',
    exact='A_E + A_S, A_S among turns from one state',
    ours='a state is all observations so far',
    test='tests/algorithms/turn_credit_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {'advantage': {'name': 'sum', 'terms': {
      'episode': {'name': 'z'},
      'step': {'name': 'state_z', 'gamma': 0.95, 'state_part': 'history', 'weight': 1.0}}}}}})
  return c
