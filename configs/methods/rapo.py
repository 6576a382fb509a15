"""RAPO, stage 1: solved questions are dropped, dead groups made up for, and lost ones helped by an earlier success.

Code FractalAIResearchLabs/Fathom-DeepResearch. Paper: 5 samples, batch 32 in two updates, learning rate 1e-6,
temperature 1.4, reward .1 format + .9 answer. Questions have to come up again for any of it to act, so the stage
asks 240 of them. Its second stage changes the reward: --config.reward.shapings="({'name': 'steerable',
'search_tools': ('lookup',)},)".

    python -m agentrl.main --config=configs/methods/rapo.py --workdir=runs/rapo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='RAPO',
    source='code FractalAIResearchLabs/Fathom-DeepResearch',
    exact='pruning at .9, advantages times G / G_good, latest success with its stored log-probs, row mean',
    ours='240 questions; temperature 1, as the toy world has it',
    test='tests/experience/memories_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.weights = ConfigDict({'accuracy': 0.9, 'format': 0.1})
  c.rl.tasks = 240
  c.rl.minibatches = 2
  c.rl.memory = ConfigDict({'name': 'prompt_success', 'threshold': 0.5, 'solved': 0.9})
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {'maps': 'revive'}}, 'aggregation': 'seq_mean_tok_mean'})
  return c
