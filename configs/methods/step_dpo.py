"""Preferences of single steps: the turn after which most samples succeed against the one after which fewest do.

The source finds the first wrong step of an answer and regenerates it; here samples are branched back at
random turns and a step is worth the mean success from there on. beta 0.4 is recalled, not checked.

    python -m agentrl.main --config=configs/methods/step_dpo.py --workdir=runs/step_dpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='Step-DPO',
    source='Lai et al., arXiv 2406.18629 (recalled)',
    exact='loss on one step after a common prefix',
    ours='worth of a step: mean success of the samples through it; rounds',
    test='tests/synthesis/pairs_test.py',
    claim=dict(metric='success', better='higher', than='cold_start'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'branch_back'
  c.agent.options = ConfigDict({'samples': 2, 'steps': 1, 'branches': 3, 'choose': 'random'})
  c.preference.options.beta = 0.4
  c.preference.miners.pairs = ConfigDict({'name': 'step_pairs', 'rule': 'value'})
  c.preference.steps = 30
  c.preference.prompts = 16
  c.preference.group_size = 8
  c.preference.pairs = 32
  c.preference.max_updates = 2
  c.preference.trajectories_every = 1_000
  c.stages = ('sft', 'eval:cold_start', 'preference', 'eval:final')
  return c
