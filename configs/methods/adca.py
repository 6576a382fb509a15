"""ADCA-GRPO (AgentEvolver): each turn is labelled good or bad, and has the sum of what follows as its advantage.

Exact: labels of plus or minus 0.2; z-scores in the group in which each trajectory weighs the same; 0.1 (the
documentation's; 0.2 in the script) times those plus the outcome's z-score on the last turn, summed from each turn
on; KL 0.001.
Ours: a rule of the toy world labels; the weight is not switched off after 20 epochs, which the toy run never
reaches. Rollouts that are guided by retrieved experience are configs/methods/agent_evolver.py; its other
scheme is the shaping's scheme 'allocation' with alpha 1 and part ''.

    python -m agentrl.main --config=configs/methods/adca.py --workdir=runs/adca

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='ADCA-GRPO',
    source='AgentEvolver, code modelscope/AgentEvolver adca_grpo.py',
    exact='suffix sums of labelled steps at 0.1 and the outcome at the end, KL 0.001',
    ours='a rule labels steps; its weight stays',
    test='tests/algorithms/turn_credit_test.py',
    claim=dict(metric='avoidable_calls', better='lower', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = ({'name': 'step_label', 'size': 0.2},)
  c.rl.reference = True
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({
      'channels': {'policy': {'advantage': {'name': 'suffix_sum', 'turn_part': 'step_label', 'alpha': 0.1}}},
      'regularisers': {'kl': 0.001}})
  return c
