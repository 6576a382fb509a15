"""DIRL (SpaceTools): reinforcement, then imitation of what came of it, then reinforcement again.

Paper: (1) GRPO with a single tool, 5 epochs of 4k samples; (2) imitation of 2k of its right traces and 6k of a
larger model, 2 epochs, learning rate 1e-5; (3) GRPO with all tools, 2 epochs of 8k samples. 5 samples, batch 64,
learning rate 1e-6, KL 1e-4, no entropy term, temperature 1. Here both stages of reinforcement have all tools, and
the traces are the run's own alone.

    python -m agentrl.main --config=configs/methods/dirl.py --workdir=runs/dirl

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='DIRL',
    source='SpaceTools, paper',
    exact='imitation of own right traces between two stages of GRPO, KL 1e-4 to the start of each',
    ours='all tools in both stages; own traces alone; 15 steps each',
    test='tests/training/own_traces_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.stages = ('sft', 'eval:cold_start', 'rl:first', 'own_traces', 'rl:second', 'eval:final')
  c.rl.steps = 15
  c.rl.trajectories_every = 1
  c.rl.reference = True
  c.rl.options = ConfigDict({'kl_coef': 1e-4})
  c.own_traces.batch_rows = 16
  return c
