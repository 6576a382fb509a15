"""CLEANER (SAAR): a failed call that the policy mends is replaced by the mended one, and DAPO learns from the rest.

Exact: up to 3 retries; the whole turn replaced where the calls are less than 0.5 alike (difflib), else the call alone;
every row; clip 0.2 / 0.28, dual 10, token mean, length penalty, groups without signal resampled; log-probs recomputed
on the spliced row. The paper: 16 samples, batch 128 in 4 updates, learning rate 2e-6, half precision.
Ours: 2 updates a step; purification is drawn once a row; the tools keep what failed calls did to them.

    python -m agentrl.main --config=configs/methods/cleaner.py --workdir=runs/cleaner

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='CLEANER (SAAR)',
    source='code Tianshi-Xu/Open-CLEANER',
    exact='3 retries, similarity 0.5, probability 1, recomputed log-probs, DAPO',
    ours='2 updates a step',
    test='tests/agents/rollback_purify_test.py',
    claim=dict(metric='failed_call_rate', better='lower', than='dapo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'rollback_purify'
  c.rl.recompute_behaviour = True
  c.rl.options = ConfigDict({'clip_low': 0.2, 'clip_high': 0.28, 'clip_dual': 10.0})
  c.rl.minibatches = 2
  c.rl.select = ({'name': 'drop_zero_std', 'part': 'accuracy'},)
  c.rl.max_generation_batches = 10
  c.reward.shapings = ({'name': 'overlong', 'max_tokens': 48, 'buffer': 10, 'factor': 0.5},)
  return c
