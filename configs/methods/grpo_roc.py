"""GRPO-RoC (rStar2-Agent): sample twice as many as are trained on, keep clean right ones and any wrong ones.

Code microsoft/rStar; the paper samples the right ones by their penalty, which this does, the release sorts them
(choose 'sorted'). Paper: 32 samples thinned out to 16, batch 128, learning rate 1e-6, no KL and no entropy term;
here 16 to 8.

    python -m agentrl.main --config=configs/methods/grpo_roc.py --workdir=runs/grpo_roc

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='GRPO-RoC',
    source='rStar2-Agent, code microsoft/rStar',
    exact='half of twice the samples, in proportion, the right ones by their penalty; clip .2/.28',
    ours='16 samples to 8 (paper 32 to 16); 2 updates a step',
    test='tests/algorithms/selectors_test.py',
    claim=dict(metric='failed_call_rate', better='lower', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.group_size = 16
  c.rl.prompts = 16
  c.rl.minibatches = 2
  c.rl.select = ({'name': 'drop_zero_std'}, {'name': 'roc_downsample', 'keep': 8, 'choose': 'sampled'})
  c.rl.options = ConfigDict({'clip_low': 0.2, 'clip_high': 0.28})
  return c
