"""DeepTravel: the whole must hold and every turn of it; questions that all failed come back.

Source read on a secondary page; period and share of the replay were not found, nor a KL term. There two models
verify, first the trajectory, then its turns; here the toy world does. Paper: 8 samples. Questions come back with
fresh samples.

    python -m agentrl.main --config=configs/methods/deeptravel.py --workdir=runs/deeptravel

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='DeepTravel',
    source='DeepTravel, secondary page',
    exact='trajectory verified before its turns; failed questions asked again with fresh samples',
    ours='half the reward for the outcome; every 4 steps a quarter of the questions',
    test='tests/experience/memories_test.py',
    claim=dict(metric='avoidable_calls', better='lower', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = (
      {'name': 'true_values'},
      {'name': 'gate', 'order': ({'part': 'accuracy', 'weight': 0.5},
                                 {'part': 'true_need', 'reduce': 'min', 'weight': 0.5})})
  c.rl.memory = ConfigDict({'name': 'failed_queries', 'every': 4, 'share': 0.25})
  return c
