"""DCPO (Memory as Action): the context is edited on the way, and each stretch between edits is a row.

Exact, from a page of notes: rows hold the context after an edit and what is drawn until the next, only that in the
loss; the trajectory's z-score for all its rows; reward 1, -0.1 where the budget is broken, else 0; 8 trajectories, 16
of whose rows are trained on.
Ours: a rule forgets the oldest exchanges above 44 tokens, because the toy policy does not know how to forget (the tool
`prune` lets one that does); clip 0.2.

    python -m agentrl.main --config=configs/methods/dcpo.py --workdir=runs/dcpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='DCPO (MemAct)',
    source='a page of notes',
    exact='segments at edits, new tokens only, one advantage for all, 16 of them a group, reward -0.1',
    ours='a rule edits; clip 0.2',
    test='tests/agents/context_edits_agents_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'context_segments'
  c.agent.options = ConfigDict({'budget': 44})
  c.reward.weights = ConfigDict({'accuracy': 1.0, 'truncated': -0.1})
  return c
