"""PORTool: rollouts as a tree; each step is compared with the other steps taken from the same place.

Exact, from a page about it: n rows at the first step, f forks of each unfinished row after it of which as many are
kept; a step is worth the best that can be reached from it, plus a little for calls that are well-formed and run;
advantage = z among the children of a node + z over trajectories.
Ours: weights 1 and 1, and 0.1 for calls; no decay; which forks are kept is drawn uniformly; an only child's fork term
is 0. None of these was found in the source.

    python -m agentrl.main --config=configs/methods/portool.py --workdir=runs/portool

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='PORTool',
    source='a page about it',
    exact='tree of n rows, step worth what it reaches, fork z + trajectory z',
    ours='weights, no decay, uniform choice of forks',
    test='tests/agents/tree_fork_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.agent.name = 'tree_fork'
  c.agent.options = ConfigDict({'forks': 2})
  c.reward.shapings = ({'name': 'descendants'},)
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {'advantage': {'name': 'sum', 'terms': {
      'forks': {'name': 'fork_z', 'part': 'accuracy', 'turn_part': 'call_quality'},
      'outcome': {'name': 'z'}}}}}})
  return c
