"""Tool-integrated reasoning as verl-tool does it: DAPO's loss, and rollouts with a void turn left out.

Code TIGER-AI-Lab/verl-tool; leaving out rollouts with a turn that neither calls nor answers is SimpleTIR's,
recalled. Observations are masked, errors are shown as text, tokens come from the engine.

    python -m agentrl.main --config=configs/methods/tir.py --workdir=runs/tir

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='TIR',
    source='code TIGER-AI-Lab/verl-tool',
    exact='observations masked, errors as text, clip .2/.28',
    ours='void turns stay in the baseline; format counts .1',
    test='tests/algorithms/selectors_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.weights = ConfigDict({'accuracy': 0.9, 'format': 0.1})
  c.reward.shapings = ({'name': 'flags'},)
  c.rl.select = ({'name': 'mask_flags', 'parts': ('void_turn',)},)
  c.rl.minibatches = 2
  c.rl.options = ConfigDict({'clip_low': 0.2, 'clip_high': 0.28})
  return c
