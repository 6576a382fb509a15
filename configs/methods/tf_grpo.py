"""Training-Free GRPO: groups are compared in words, and a frozen policy reads what came of it.

Advice is distilled from groups that are partly right and shown in every later prompt. In the source a language
model writes it; here a rule does, since a toy policy cannot: this exercises the loop (mixed groups only, ADD,
UPDATE and DELETE merged at the end of a batch), not the summaries. The paper: groups of 5, 3 epochs, 100 questions
(recalled).

    python -m agentrl.main --config=configs/methods/tf_grpo.py --workdir=runs/tf_grpo

Toy result: see docs/methods.md.
"""

from configs import toy

METHOD = dict(
    title='Training-Free GRPO',
    source='Training-Free GRPO, code TencentCloudADP/youtu-agent',
    exact='frozen policy, groups with 0 < mean < 1, at most two experiences a group, operations merged a batch',
    ours='a rule writes the experiences, not a language model; advice in the cold start',
    test='tests/agents/frozen_agents_test.py',
    claim=dict(metric='calls_per_task', better='lower', than='cold_start'))


def get_config():
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'text_experience'
  c.sft.demonstrator = 'with_hints'
  c.sft.options.kind = 'advice'
  c.rl.learning_rate = 0.0  # the policy is frozen
  c.rl.group_size = 5
  c.rollout.context_tokens = 112
  c.rollout.capacities = (112,)
  c.train.row_length = 224
  c.eval.agent = True
  return c
