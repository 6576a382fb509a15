"""VSPO with PRS: groups without value give their place to valuable ones; the reward has stages.

Source read on a secondary page. Value (largest reward - mean) * deviation; which groups are replaced, the decay of
repeated ones and the weights of the stages (calls parse, format, answer) were not found. Paper: 5 samples, learning
rate 1e-6, KL .001, clip .2; answers scored by BLEU or by a model, here right or wrong.

    python -m agentrl.main --config=configs/methods/vspo.py --workdir=runs/vspo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='VSPO + PRS',
    source='VSPO, secondary page',
    exact='value of a group, groups drawn in proportion to it, KL .001',
    ours='groups of value 0 are replaced, repeats share their advantage, stage weights .1 .1 .8; no judge',
    test='tests/algorithms/selectors_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = (
      {'name': 'tool_use'},
      {'name': 'gate', 'order': ({'part': 'calls_parse', 'weight': 0.1}, {'part': 'format', 'weight': 0.1},
                                 {'part': 'accuracy', 'weight': 0.8})})
  c.rl.select = ({'name': 'value_replace'},)
  c.rl.reference = True
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {'maps': 'repeat_decay'}}, 'regularisers': {'kl': 0.001}})
  return c
