"""INSPO: instructions compete for questions while the policy learns.

Exact, from a page about it: an instruction drawn by softmax of its weight for each question, samples compared under the
same question and instruction, rewards credited to it, the weakest pruned at intervals.
Ours: new instructions come from a list, as there is no model here to reflect on failures; weight = mean reward;
temperature 0.2, an interval of 5 steps, 3 instructions (none was found). The toy policy has read no instructions:
they are strings of its vocabulary, whose use it has to learn.

    python -m agentrl.main --config=configs/methods/inspo.py --workdir=runs/inspo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='INSPO',
    source='a page about it',
    exact='softmax draw, same instruction in a group, credit, pruning',
    ours='proposals from a list; all numbers',
    test='tests/agents/instruction_population_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'instruction_population'
  c.agent.options = ConfigDict({'instructions': ('', 'lookup', 'calculator'), 'every': 5, 'temperature': 0.2,
                                'proposals': ('F', 'P', 'lookup; calculator')})
  return c
