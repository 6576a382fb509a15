"""Optimisers by name, all from optax."""

from __future__ import annotations

from typing import Any

import optax

from agentrl.models import lora

# Leaves that Muon updates as matrices: the dimensions summed over, those produced.
_MUON_AXES = {
    'qkv': ((1,), (2, 3, 4)),
    'out': ((1, 2, 3), (4,)),
    'up': ((1,), (2, 3)),
    'down': ((1,), (2,)),
}


def schedule(name: str, peak: float, steps: int, warmup: int) -> optax.Schedule:
  """Returns a learning rate over updates.

  Args:
    name: 'constant', 'linear' or 'cosine', the last two down to a tenth of the peak.
    peak: After the warm-up.
    steps: Updates of the stage.
    warmup: Updates of linear rise from 0.
  Raises:
    ValueError: if the name is unknown.
  """
  after = max(1, steps - warmup)
  shapes = {
      'constant': lambda: optax.constant_schedule(peak),
      'linear': lambda: optax.linear_schedule(peak, 0.1 * peak, after),
      'cosine': lambda: optax.cosine_decay_schedule(peak, after, alpha=0.1),
  }
  if name not in shapes:
    raise ValueError(f'schedule {name!r} is unknown; known: {", ".join(shapes)}')
  if not warmup:
    return shapes[name]()
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), shapes[name]()], [warmup])


def make_optimizer(name: str, learning_rate: Any, *, weight_decay: float = 0.0, max_grad_norm: float = 1.0,
                   b1: float = 0.9, b2: float = 0.95, adam_scale: float = 1.0) -> optax.GradientTransformation:
  """Returns an optimiser with gradient clipping by global norm; of a policy with adapters, it moves those alone.

  Args:
    name: 'adamw'; 'muon' for the matrices of the layers with adamw for the rest; or 'adafactor', whose second moments of
      a matrix are one number a row and one a column, and which has no first ones.
    learning_rate: A number or a schedule.
    weight_decay: Decoupled.
    max_grad_norm: Gradients with a larger norm are scaled down to it; 0 for no clipping.
    b1: Of Adam.
    b2: Of Adam.
    adam_scale: Muon only: Adam's learning rate divided by Muon's.
  Raises:
    ValueError: if the name is unknown.
  Source: Muon, Jordan et al. 2024, as in `optax.contrib`; Adafactor, Shazeer and Stern, arXiv 1804.04235, with the
    decay of AdamW and without scaling by the parameters' size.
  """
  if name == 'adamw':
    update = optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)
  elif name == 'muon':
    rate = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
    update = optax.contrib.muon(
        rate, weight_decay=weight_decay, adam_b1=b1, adam_b2=b2, adam_weight_decay=weight_decay,
        adam_learning_rate=lambda count: adam_scale * rate(count), muon_weight_dimension_numbers=_muon_dimensions,
        consistent_rms=0.2)
  elif name == 'adafactor':
    update = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0),
                         optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate))
  else:
    raise ValueError(f'optimiser {name!r} is unknown; known: adafactor, adamw, muon')
  update = optax.chain(optax.clip_by_global_norm(max_grad_norm), update) if max_grad_norm else update
  return lora.for_policy(update)


def _muon_dimensions(params: Any) -> Any:
  from jax import tree_util  # pylint: disable=g-import-not-at-top

  def of(path, _):
    axes = _MUON_AXES.get(path[-1].key)
    return optax.contrib.MuonDimensionNumbers(*axes) if axes else None

  return tree_util.tree_map_with_path(of, params)
