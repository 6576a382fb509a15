"""ARPO: rollouts branch where the policy has become less sure after a tool's answer; soft attribution.

Exact: half of a group begins; after each turn a row branches with probability 0.5 + 0.2 (H - H_0), once a round, H the
entropy of a turn's first 20 tokens; GRPO with clip 0.2, dual 3, mean over tokens, no KL; a bad format costs 1. The
paper: 16 rollouts of which 8 begin, batch 128, learning rate 1e-6.
Ours: entropies of the whole vocabulary; rows that are missing at the end are sampled. The bonus for using both tools
is left out: one tool does here.

    python -m agentrl.main --config=configs/methods/arpo.py --workdir=runs/arpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='ARPO (soft)',
    source='code RUC-NLPIR/ARPO',
    exact='branching rule, half of the rows begin, dual clip 3, soft attribution',
    ours='exact entropies; no bonus for two tools',
    test='tests/agents/branch_entropy_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'branch_entropy'
  c.reward.shapings = ({'name': 'format_gate'},)
  c.rl.options = ConfigDict({'clip_low': 0.2, 'clip_high': 0.2, 'clip_dual': 3.0})
  return c
