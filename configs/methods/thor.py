"""THOR: trajectories, and calls that failed, which are sampled anew as a second channel.

Exact: channel 1 GRPO, clip 0.2 / 0.28, dual 3, mean over tokens; rows with a failed call left out, and groups with
fewer than half left or without signal; 0.01 times the likelihood of tokens with a positive advantage; channel 2
compares suffixes of one anchor by whether their call runs, loss on the suffix alone, at most as many anchors as
questions. The paper: 16 rollouts and suffixes, cut 100 tokens before the call, learning rate 1e-6.
Ours: 8 suffixes, cut 2 tokens before; a weight of 1 for channel 2. The source also leaves out rows of fewer than 150
tokens and gives nothing for repetition; neither occurs here.

    python -m agentrl.main --config=configs/methods/thor.py --workdir=runs/thor

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='THOR',
    source='code JingMog/THOR',
    exact='two channels, own group per anchor, loss on suffixes, likelihood 0.01, group share 0.5',
    ours='8 suffixes, cut 2 tokens before the call; no shortest length',
    test='tests/agents/suffix_resample_test.py',
    claim=dict(metric='failed_call_rate', better='lower', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'suffix_resample'
  c.agent.options = ConfigDict({'suffixes': 8, 'before': 2})
  c.rl.select = ({'name': 'mask_flags', 'parts': ('flawed',), 'in_baseline': False, 'min_share': 0.5},
                 {'name': 'drop_zero_std', 'part': 'accuracy', 'unless': 'suffix'})
  clip = {'name': 'asym', 'low': 0.2, 'high': 0.28, 'dual': 3.0}
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({
      'channels': {
          'trajectory': {'clip': clip, 'rows': {'name': 'fresh', 'part': 'suffix'}},
          'suffix': {'clip': clip, 'rows': {'name': 'replayed', 'part': 'suffix'},
                     'advantage': {'name': 'z', 'part': 'executes'}}},
      'regularisers': {'nll_positive': {'coef': 0.01, 'channel': 'trajectory'}}})
  return c
