"""Flow-GRPO (AgentFlow): statistics of a group run over the turns of all its trajectories.

Exact: every turn carries the trajectory's reward, so that long ones weigh more in mean and deviation; `rows=False`
gives each trajectory the same weight. Clip 0.2 / 0.3, KL 0.001. The paper: 8 samples, learning rate 1e-6,
temperature 0.7.
Every turn is a row whose context is the question and a memory of calls and results.
Rows with too long a prompt are left out and empty rollouts asked again in the release; neither occurs here.
Ours: a rule writes the memory, where the paper has frozen models around the planner; the answer is checked, not judged.

    python -m agentrl.main --config=configs/methods/flow_grpo.py --workdir=runs/flow_grpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='Flow-GRPO (AgentFlow)',
    source='code lupantech/AgentFlow',
    exact='z over turn rows, clip 0.2 / 0.3, KL 0.001',
    ours='a rule writes the memory; the planner answers itself',
    test='tests/algorithms/baselines_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'turn_rows'
  c.rl.reference = True
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({
      'channels': {'policy': {'advantage': {'name': 'turn_rows_z'},
                              'clip': {'name': 'asym', 'low': 0.2, 'high': 0.3}}},
      'regularisers': {'kl': 0.001}})
  return c
