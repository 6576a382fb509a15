"""SPEAR: explore with a bonus for tools that fades, imitate the best of oneself more and more.

Code TencentYoutuResearch/SPEAR. Two channels: fresh trajectories, centred, summed over a constant; and a buffer of
earlier ones that were better than their group and called a tool, against the median of late group means. Its steps
are scaled down: the bonus fades over 200 of its steps and the second channel comes in over 100 to 300, here over
the 30 of the stage; 2048 replayed rows at most, here 64.

    python -m agentrl.main --config=configs/methods/spear.py --workdir=runs/spear

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='SPEAR',
    source='code TencentYoutuResearch/SPEAR',
    exact='bonus, masks, top 75 % of groups, buffer with percentile baseline, clip-cov, weights over time',
    ours='its steps scaled to 30; a buffer of 32; replay in the update of its step',
    test='tests/experience/memories_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  fresh = {'advantage': 'center', 'clip': {'name': 'asym', 'low': 0.2, 'high': 0.28, 'dual': 10.0}, 'rows': 'fresh'}
  replay = {'advantage': {'name': 'given', 'baseline_part': 'percentile'}, 'rows': 'replayed',
            'clip': {'name': 'asym', 'low': 0.2, 'high': 0.28, 'dual': 10.0},
            'maps': {'name': 'clip_cov', 'ratio': 0.02, 'low': 1.0, 'high': 40.0},
            'weight': {'schedule': 'cosine', 'start': 0.0, 'end': 1.0, 'steps': 60}}
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({
      'channels': {'policy': fresh, 'replay': replay}, 'aggregation': {'name': 'sum_over_constant', 'max_tokens': 48}})
  c.rl.minibatches = 2
  c.rl.memory = ConfigDict({'name': 'sil_buffer', 'size': 32, 'most': 64})
  c.reward.shapings = ({'name': 'tool_use'}, {'name': 'bonus_anneal', 'steps': c.rl.steps}, {'name': 'flags'})
  c.rl.select = ({'name': 'mask_flags', 'parts': ('truncated', 'void_turn', 'repetitive', 'unreadable')},
                 {'name': 'top_std', 'share': 0.75})
  return c
