"""Search-R1 with GRPO: the answer alone is rewarded, what tools wrote is in neither the loss nor the KL term.

Code PeterGriffinJin/Search-R1. Its settings: 5 samples, KL .001 (k3), clip .2, token mean, learning rate 1e-6 with
a warm-up of .285, batch 512 in updates of 256, temperature 1. Its variant with PPO is
configs/methods/search_r1_ppo.py.

    python -m agentrl.main --config=configs/methods/search_r1.py --workdir=runs/search_r1

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='Search-R1 (GRPO)',
    source='code PeterGriffinJin/Search-R1',
    exact='exact match alone, KL .001 on drawn tokens only, 2 updates a step',
    ours='none',
    test='tests/contracts/objective_contract_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.reference = True
  c.rl.minibatches = 2
  c.rl.options = ConfigDict({'kl_coef': 0.001, 'kl_estimator': 'k3'})
  return c
