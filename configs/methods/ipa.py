"""IPA (ROME): turns as units, good ones without a ratio, and rollouts that begin within earlier solutions.

Exact: the return of a turn, discounted, on its tokens; weight 1 for good turns and the geometric mean ratio of a turn,
at most 1, for bad ones; trajectories that the environment spoiled are rejected and sampled anew from where they began,
here twice at most; rollouts begin behind a prefix of a success, which shortens as they succeed; a likelihood term on
what was solved, weighted by returns.
Ours: discount 0.95 and weights 1 and 0.1 (the paper's were not found); returns less the group's mean, as without it
rewards of 0 and 1 leave nothing bad; the policy's own successes instead of an expert's. Questions come again, so that
there is something to begin from: 48 of them. The mismatch mask is without effect where sampler and learner agree.

    python -m agentrl.main --config=configs/methods/ipa.py --workdir=runs/ipa

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='IPA (ROME)',
    source='paper section 3.2.4, code alibaba/ROLL',
    exact='turn returns and ratios, one-sided weights, prefixes, imitation',
    ours='discount, weights, baseline; own successes',
    test='tests/agents/prefix_init_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'prefix_init'
  c.agent.options = ConfigDict({'retries': 2})
  c.rl.tasks = 48
  c.rl.memory = ConfigDict({'name': 'successes', 'size': 48, 'most': 16})
  c.reward.shapings = ({'name': 'flags'},)
  c.rl.select = ({'name': 'env_noise_reject'},)
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {
      'turns': {'advantage': {'name': 'disc_segment_return', 'gamma': 0.95, 'group_baseline': True}, 'rows': 'fresh',
                'ratio': 'segment_geo', 'clip': 'one_sided_neg'},
      'imitation': {'advantage': {'name': 'disc_segment_return', 'gamma': 0.95}, 'rows': 'replayed', 'ratio': 'off',
                    'clip': 'log_likelihood', 'weight': 0.1}}})
  return c
