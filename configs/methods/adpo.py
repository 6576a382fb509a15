"""ADPO (Agent0): the group's most frequent answer is its label, trusted as far as the group agrees.

Exact: reward 1 for the majority's answer; A times 0.5 + 0.5 clip((p - 0.3) / 0.5, 0, 1) with p the majority's
share; upper bound 0.2 + 0.1 clip((0.8 - p) / 0.5, 0, 1); tasks with p in [0.3, 0.8]; KL 0.01. The paper: 16
samples, learning rate 1e-6.
Ours: the band selects groups of each step; no curriculum agent writes tasks. No right answer is read in training.

    python -m agentrl.main --config=configs/methods/adpo.py --workdir=runs/adpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='ADPO',
    source='Agent0, code aiming-lab/Agent0',
    exact='votes as labels, scale 0.5 to 1, upper bound by agreement, band [0.3, 0.8], KL 0.01',
    ours='the band selects groups of a step; no curriculum agent',
    test='tests/algorithms/consensus_test.py',
    claim=None)


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = ({'name': 'majority_vote'},)
  c.rl.select = ({'name': 'band', 'low': 0.3, 'high': 0.8},)
  c.rl.reference = True
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({
      'channels': {'policy': {'maps': ('consensus_scale',), 'clip': 'dyn_high'}},
      'regularisers': {'kl': 0.01}})
  return c
