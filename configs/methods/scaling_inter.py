"""ScalingInter-RL (AgentGym-RL): more turns as training goes on.

Exact: turns = rounds[min(step // K, last)]; GRPO, KL 0.001, 2 epochs; rows that reach the limit are trained on with the
reward that they get. The paper: K of 80 to 100, rounds such as 8, 12, 15, 4 samples, batch 32, learning rate 1e-6.
Ours: K = 10 and rounds 4, 6, 8, for 30 steps of questions that take up to 5 turns.

    python -m agentrl.main --config=configs/methods/scaling_inter.py --workdir=runs/scaling_inter

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='ScalingInter-RL',
    source='AgentGym-RL, code WooooDyy/AgentGym-RL',
    exact='turns a step function of the step, KL 0.001, 2 epochs',
    ours='10 steps a phase; 4, 6, 8 turns',
    test='tests/agents/horizon_test.py',
    claim=dict(metric='calls_per_task', better='lower', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'horizon'
  c.agent.options = ConfigDict({'rounds': (4, 6, 8), 'every': 10})
  c.rl.epochs = 2
  c.rl.reference = True
  c.rl.options = ConfigDict({'kl_coef': 0.001})
  return c
