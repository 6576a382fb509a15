"""iStar (OPRL): an implicit process reward model, trained beside the policy, adds advantages of steps.

The reward model is a copy of the policy that learns by DPO which trajectories of a group succeeded; a step's reward
is beta times how much likelier it finds the step than the policy that drew it. A = A_E + alpha A_S. beta 0.05 and
alpha 1 are the source's, as are 8 samples and no KL; its learning rates are 5e-7 and, for the reward model, 1e-6.

    python -m agentrl.main --config=configs/methods/istar.py --workdir=runs/istar

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='iStar (OPRL)',
    source='OPRL, code Tongyi-ConvAI/Qwen-Character',
    exact='online trajectory DPO against the sampling policy; step rewards; z over trajectories plus z over steps',
    ours='learn before scoring; learning rate of the reward model; no penalty for invalid actions',
    test='tests/training/side_models_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.side.prm = ConfigDict({'name': 'implicit_prm', 'beta': 0.05, 'learning_rate': 1e-4})
  c.rl.algorithm = 'compose'
  c.rl.options.channels = ConfigDict({'policy': {'advantage': {'name': 'sum', 'terms': {
      'episode': {'name': 'z'},
      'step': {'name': 'step_z', 'turn_part': 'implicit', 'weight': 1.0}}}}})
  return c
