"""Tests of what a policy's shape refuses."""

from __future__ import annotations

import pytest

from agentrl.models.config import ModelConfig


@pytest.mark.parametrize('settings, words', [
    (dict(num_heads=6, num_kv_heads=4), ('num_heads=6', 'num_kv_heads=4')),
    (dict(head_dim=7), ('head_dim=7', 'even')),
    (dict(activation='tanh'), ("'tanh'", 'silu', 'gelu', 'relu2')),
    (dict(num_layers=0), ('num_layers', 'at least 1')),
    (dict(width=0, ff_width=-3), ('width, ff_width', 'at least 1')),
])
def test_impossible_shapes_are_refused_by_name(settings, words):
  with pytest.raises(ValueError) as caught:
    ModelConfig(vocab_size=8, **settings)
  for word in words:
    assert word in str(caught.value)


def test_group_size_is_query_heads_per_key_head():
  assert ModelConfig(vocab_size=8, num_heads=6, num_kv_heads=2).group_size == 3
  assert ModelConfig(vocab_size=8, num_heads=6, num_kv_heads=6).group_size == 1


def test_chunk_of_zero_means_all_at_once_and_is_allowed():
  assert ModelConfig(vocab_size=8, logit_chunk=0).logit_chunk == 0
