"""AEPO: ARPO with a balanced branch budget, a clip that keeps gradients, and advantages raised by entropy.

Exact: the first rollout tells how many begin: n sigmoid((H_root - H_tool) / 2) + 1; a branch is made where
(U + 0.2 dH) max(0, 1 - 0.05 b) >= 0.5, b branches so far; above the band good tokens keep a gradient of 1.2; dual 3;
A (1 + 0.2 z(H)) within the group. Read in third-party copies of the code: 16 rollouts, batch 64, 8 updates a step,
learning rate 1e-6. The released scripts switch branching off, and their entropies are 0 unless there is an entropy
bonus; ours does what the paper says.
Ours: the first rollout is one of the group's; 2 updates a step. As in configs/methods/arpo.py there is no bonus for
using both tools.

    python -m agentrl.main --config=configs/methods/aepo.py --workdir=runs/aepo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='AEPO',
    source='copies of the AEPO tree',
    exact='monitored start, branch penalty 0.05, grad_preserve, entropy weight 0.2',
    ours='the monitoring rollout is one of the group; no bonus for two tools; 2 updates a step',
    test='tests/agents/branch_entropy_test.py',
    claim=dict(metric='success', better='higher', than='arpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'branch_entropy'
  c.agent.options = ConfigDict({'balanced': True})
  c.reward.shapings = ({'name': 'format_gate'},)
  c.rl.minibatches = 2
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {
      'maps': {'name': 'entropy_scale', 'weight': 0.2},
      'clip': {'name': 'grad_preserve', 'low': 0.2, 'high': 0.2, 'dual': 3.0}}}})
  return c
