"""What is compiled: a policy, the chips it is trained on, and how it is laid out on them."""

from __future__ import annotations

import dataclasses
import math
from typing import Mapping

from agentrl.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Case:
  """A policy on a slice of TPUs, learning from groups of long rollouts.

  The sampler of each process works on the chips of its own host, or on as many more as hold the weights.

  Attributes:
    name: Of the case.
    model: The policy.
    slice: As the cloud names it.
    topology: As jax names it; v5p slices are named by cores, of which a chip has two.
    mesh: The learner's.
    micro_rows: Rows in one forward and backward pass.
    sampler_topology: Chips of one sampler.
    sampler_mesh: Its mesh.
    slots: Of one sampler.
    context: Tokens of a row, and of a slot at most.
    prompts: Of a step.
    group_size: Rollouts of each.
    chunk: Steps of one call of decode.
    block: Tokens of a block of the cache.
    extend_rows: Contexts that one call of extend writes to.
    extend_tokens: Tokens that it writes to each.
  """

  name: str
  model: ModelConfig
  slice: str
  topology: str
  mesh: Mapping[str, int]
  micro_rows: int
  sampler_topology: str
  sampler_mesh: Mapping[str, int]
  slots: int
  context: int = 32_768
  prompts: int = 64
  group_size: int = 8
  chunk: int = 16
  block: int = 128
  extend_rows: int = 2
  extend_tokens: int = 1_024

  @property
  def generation(self) -> str:
    """Of the chips: 'v5e', 'v5p' or 'v6e'."""
    return self.topology.partition(':')[0]

  @property
  def chips(self) -> int:
    """Of the slice."""
    return math.prod(int(n) for n in self.topology.partition(':')[2].split('x'))

  @property
  def rows(self) -> int:
    """Of an update: every rollout at its longest."""
    return self.prompts * self.group_size

  @property
  def micro_batches(self) -> int:
    """Passes of an update."""
    return self.rows // self.micro_rows


def _qwen3(layers: int, width: int, ff_width: int, heads: int, kv_heads: int, **more) -> ModelConfig:
  """Qwen3 as its published config.json files say, with the settings of a run at size."""
  return ModelConfig(
      vocab_size=151_936, num_layers=layers, width=width, ff_width=ff_width, num_heads=heads, num_kv_heads=kv_heads,
      head_dim=128, rope_theta=1e6, qk_norm=True, tied_embeddings=False, known_tokens=151_669,
      compute_dtype='bfloat16', unroll_layers=False, remat=True, logit_chunk=2_048,
      attention='splash', expert_product='megablox', **more)


QWEN3_8B = _qwen3(36, 4_096, 12_288, 32, 8)
QWEN3_32B = _qwen3(64, 5_120, 25_600, 64, 8)
QWEN3_235B = _qwen3(94, 4_096, 1_536, 64, 4, num_experts=128, experts_per_token=8)

CASES = {case.name: case for case in (
    Case('qwen3_8b_v5e_64', QWEN3_8B, 'v5e-64', 'v5e:8x8', dict(fsdp=16, tensor=4), 16, 'v5e:2x2', dict(tensor=4), 6),
    Case('qwen3_8b_v6e_16', QWEN3_8B, 'v6e-16', 'v6e:4x4', dict(fsdp=4, tensor=4), 4, 'v6e:2x2', dict(tensor=4), 14),
    Case('qwen3_32b_v5p_64', QWEN3_32B, 'v5p-64', 'v5p:2x4x4', dict(fsdp=8, tensor=4), 8, 'v5p:2x2x1', dict(tensor=4),
         24),
    Case('qwen3_235b_v5p_512', QWEN3_235B, 'v5p-512', 'v5p:4x8x8', dict(fsdp=64, tensor=4), 64, 'v5p:2x2x4',
         dict(tensor=4, expert=4), 64),
)}
