"""ToolPO (DeepAgent): the tokens of a tool call have an advantage of their own besides the outcome's.

Exact: both advantages are rewards less the group's mean; clip 0.2. The paper: 8 samples, batch 64, tools simulated
by a language model.
Ours: the tokens of a call are all of the turn that makes it; an action's reward is the number of needed facts
found, judged by the toy world; nothing folds a memory.

    python -m agentrl.main --config=configs/methods/toolpo.py --workdir=runs/toolpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='ToolPO',
    source='DeepAgent paper; its RL code is not released',
    exact='A = A_success + M A_action, both centred',
    ours='M is whole turns that call; no memory to fold',
    test='tests/algorithms/token_class_test.py',
    claim=dict(metric='failed_call_rate', better='lower', than='dr_grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = ({'name': 'action_reward'},)
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {
      'advantage': 'center', 'maps': ({'name': 'token_class_add', 'part': 'action'},)}}})
  return c
