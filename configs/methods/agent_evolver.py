"""AgentEvolver: ADCA-GRPO with half of the rollouts guided by experience that is not trained on.

Exact: as configs/methods/adca.py; hints taken out of the training context, log-probs recomputed without them; upper
clip bound 0.6 for guided rows; KL 0.001.
Ours: the hint is the tools that a success of the same family used, found by a rule; half of a group is guided; upper
bound 0.28 elsewhere.

    python -m agentrl.main --config=configs/methods/agent_evolver.py --workdir=runs/agent_evolver

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs.methods import adca

METHOD = dict(
    title='AgentEvolver',
    source='code modelscope/AgentEvolver and its documentation',
    exact='guided rows stripped and recomputed, clip 0.6 there, ADCA advantages',
    ours='a rule finds hints; half of a group; 0.28 elsewhere',
    test='tests/agents/experience_prompt_test.py',
    claim=dict(metric='success', better='higher', than='adca'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = adca.get_config()
  c.agent.name = 'experience_prompt'
  c.agent.options = ConfigDict({'share': 0.5})
  c.rl.recompute_behaviour = True
  c.rl.options.channels.policy.clip = ConfigDict({'name': 'guided', 'low': 0.2, 'high': 0.28, 'guided_high': 0.6})
  return c
