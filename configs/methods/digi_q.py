"""Digi-Q: action values on frozen features, learned from a log, and imitation of the best of 16 actions.

The log is the cold start's, the features its hidden states. Double critics with slow targets (0.1 an epoch), gamma
0.95; an action is imitated with weight clip(A, 0, 1) if A > 0.05, the threshold of web shopping. The release's
learning rates are 1e-5 and 1e-4, its gradients are clipped at 0.01.
Ours: an action must have been drawn 4 times among the 16 to be imitated. Without that the policy ends far below its
start: the best of 16 by critics of a thousand turns is one that they have never seen and overestimate most.

    python -m agentrl.main --config=configs/methods/digi_q.py --workdir=runs/digi_q

Toy result: see docs/methods.md.
"""

from configs import toy

METHOD = dict(
    title='Digi-Q',
    source='Digi-Q, code DigiRL-agent/digiq',
    exact='double Q and V, targets, gamma, best of 16, weight and threshold',
    ours='features of the policy itself; actions of the logging policy, drawn 4 times at least; clipping at 1',
    test='tests/training/offline_q_test.py',
    claim=dict(metric='success', better='higher', than='cold_start'))


def get_config():
  """Returns the config."""
  c = toy.get_config()
  c.offline_q.prompts = 256
  c.offline_q.turns = 1_024
  c.offline_q.least_draws = 4
  c.offline_q.critic_steps = 150  # targets move by a tenth a step, and a value must come down a whole trajectory
  c.offline_q.critic_learning_rate = 3e-4
  c.offline_q.actor_steps = 80
  c.offline_q.learning_rate = 3e-4
  c.stages = ('sft', 'eval:cold_start', 'offline_q', 'eval:final')
  return c
