"""Two rounds of preferences: few calls first, right at all on hard questions then; samples branched where
entropy is high.

The release: beta 0.1, 10 plain samples or the 3 least certain turns with 3 branches each, learning rate 7e-6,
LoRA of rank 8, 3 epochs. Here a group is one sample with 2 x 2 branches and 3 plain ones, and all weights are
trained.

    python -m agentrl.main --config=configs/methods/tool_light.py --workdir=runs/tool_light

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='Tool-Light',
    source='Tool-Light, code asilverlight/Tool-Light',
    exact='criteria of both rounds, hard to easy 2:1, entropy of the first tokens of a turn, beta',
    ours='group sizes; learning rate; what counts as hard; second round at half of the steps',
    test='tests/synthesis/pairs_test.py',
    claim=dict(metric='calls_per_task', better='lower', than='dpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'branch_back'
  c.agent.options = ConfigDict({'samples': 1, 'steps': 2, 'branches': 2, 'choose': 'entropy'})
  c.preference.miners.pairs = ConfigDict({'name': 'tool_light'})
  c.preference.learning_rate = 1e-4
  c.preference.steps = 30
  c.preference.prompts = 16
  c.preference.group_size = 8
  c.preference.pairs = 16
  c.preference.reference = 'round'
  c.preference.max_updates = 2
  c.preference.trajectories_every = 1_000
  c.stages = ('sft', 'eval:cold_start', 'preference', 'eval:final')
  return c
