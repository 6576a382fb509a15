"""Step preferences from trees: a step on a path that succeeded against its sibling from which nothing did.

The source takes its trees from depth-first search by a larger model; here samples of the policy are branched
back at random turns. beta 0.5 and the learning rate 1e-6 are not verified.

    python -m agentrl.main --config=configs/methods/tp_llama.py --workdir=runs/tp_llama

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='TP-LLaMA',
    source='TP-LLaMA, arXiv 2406.07115 (recalled)',
    exact='chosen on the success path, failed sibling rejected, loss on that step only, after imitation',
    ours='trees by branching back; rounds',
    test='tests/synthesis/pairs_test.py',
    claim=dict(metric='success', better='higher', than='cold_start'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'branch_back'
  c.agent.options = ConfigDict({'samples': 1, 'steps': 2, 'branches': 3, 'choose': 'random'})
  c.preference.options.beta = 0.5
  c.preference.miners.pairs = ConfigDict({'name': 'step_pairs', 'rule': 'path', 'per_group': 4})
  c.preference.steps = 30
  c.preference.prompts = 16
  c.preference.group_size = 8
  c.preference.pairs = 32
  c.preference.max_updates = 2
  c.preference.trajectories_every = 1_000
  c.stages = ('sft', 'eval:cold_start', 'preference', 'eval:final')
  return c
