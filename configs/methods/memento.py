"""Memento: nothing is trained but the choice of earlier cases to show a frozen policy.

The bank holds questions, calls and outcomes; a classifier of pairs learns which case was of use for which question,
and its best one is put into the prompt (the release shows 8, the paper 4, recalled; a toy context has room for
one). The policy has seen cases in half of its demonstrations, or it could not read them: ours.

    python -m agentrl.main --config=configs/methods/memento.py --workdir=runs/memento

Toy result: see docs/methods.md.
"""

from configs import toy

METHOD = dict(
    title='Memento',
    source='Memento (AgentFly), code Agent-on-the-Fly/Memento',
    exact='frozen policy, case bank, pair classifier by cross-entropy, top K in the prompt',
    ours='classifier on hashed characters instead of RoBERTa; K = 1; cases in the cold start',
    test='tests/agents/frozen_agents_test.py',
    claim=dict(metric='success', better='higher', than='cold_start'))


def get_config():
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'case_memory'
  c.sft.demonstrator = 'with_hints'
  c.sft.options.kind = 'cases'
  c.rl.learning_rate = 0.0  # the policy is frozen
  c.rollout.context_tokens = 112
  c.rollout.capacities = (112,)
  c.train.row_length = 224
  c.eval.agent = True
  return c
