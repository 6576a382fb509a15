"""G-RA: rewards in order of priority; a lower one counts only where those above it are met.

Source read on a secondary page; thresholds and the order of accumulation are our choice. Here: a well-formed
answer, then a right one, then the share of turns that were needed, as the toy world tells it.

    python -m agentrl.main --config=configs/methods/g_ra.py --workdir=runs/g_ra

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='G-RA',
    source='G-RA, secondary page',
    exact='a lower reward is 0 unless every higher one meets its threshold',
    ours='the rewards, their thresholds and weights',
    test='tests/rewards/shaping_test.py',
    claim=dict(metric='avoidable_calls', better='lower', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = (
      {'name': 'true_values'},
      {'name': 'gate', 'order': ({'part': 'format', 'weight': 0.1}, {'part': 'accuracy'},
                                 {'part': 'true_need', 'reduce': 'mean', 'weight': 0.5})})
  return c
