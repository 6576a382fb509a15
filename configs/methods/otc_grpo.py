"""OTC-GRPO: a right answer is worth the more the closer its calls come to the fewest that ever sufficed; GRPO.

Source read on a secondary page. Reward: right times sin(f pi / 2 n), f the harmonic mean of the calls m and the
fewest calls n of any right answer to the question so far in the run. The toy question takes at most 8 turns, so
that c, "about the most calls" of a trajectory, is 7; the source's value is not known. Under GRPO's z-score the
factor alpha has no effect.

    python -m agentrl.main --config=configs/methods/otc_grpo.py --workdir=runs/otc_grpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='OTC-GRPO',
    source='OTC, secondary page',
    exact='multiplicative reward, running minimum of calls by question',
    ours='c = 7, the most calls of a toy question',
    test='tests/rewards/shaping_test.py',
    claim=dict(metric='calls_per_task', better='lower', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = ({'name': 'mult_eff', 'variant': 'fewest', 'max_calls': 7},)
  return c
