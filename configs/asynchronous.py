"""The toy world with sampling that goes on while the learner updates: GRPO on tokens up to two steps old, weighed.

    python -m agentrl.main --config=configs/asynchronous.py --workdir=runs/asynchronous

48 groups are under way where 16 are learned from in a step. Each token has the log-prob of the policy that drew it; the
learner's own, of the policy that it updates, is computed anew, and their ratio, at most 2, weighs the advantage.

Hardware and wall time: as configs/toy.py. Expected: success as with GRPO in turns, see experiments/async.
"""

from ml_collections import ConfigDict

from configs import toy


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.staleness = 2
  c.rl.overlap = True
  c.rl.recompute_behaviour = True
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {'maps': ({'name': 'mismatch_weight', 'cap': 2.0},)}}})
  return c
