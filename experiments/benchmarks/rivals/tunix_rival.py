r"""Measures google-tunix (its vanilla sampler) on the workload of `common.py`.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 .venv-rivals/bin/python \
        experiments/benchmarks/rivals/tunix_rival.py --phase decode --threads 1

How many threads it uses is up to whoever starts it, as above; `run.py` does.

Phases: decode (prompts in, 64 sampled tokens out), update (one GRPO update), iteration (both, by
the GRPO learner's own loop), three_turns_agentic (its agentic learner), three_turns (the best that
can be written by hand over its sampler: the whole batch prefilled again each turn).
"""

from __future__ import annotations

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TQDM_DISABLE', '1')

import dataclasses
import time
import warnings

warnings.filterwarnings('ignore')

import common
from common import WORKLOAD as W
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster
from tunix.rl.agentic import agentic_grpo_learner
from tunix.rl.agentic.agents import model_agent
from tunix.rl.agentic.environments import base_environment
from tunix.rl.agentic.parser.chat_template_parser import parser as chat_parser
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.rl.rollout import vanilla_rollout

# No id of the vocabulary: nothing ends a sample early, so that all are of one length.
_NEVER = [W.vocabulary + 7]


def make_policy(seed: int = 0) -> qwen2.Qwen2:
  """Returns the policy with a tied head, randomly initialised."""
  config = qwen2.ModelConfig(
      num_layers=W.layers, vocab_size=W.vocabulary, embed_dim=W.width, hidden_dim=W.feed_forward,
      num_heads=W.heads, head_dim=W.head_dim, num_kv_heads=W.kv_heads, rope_theta=10_000,
      norm_eps=1e-6, use_tied_embedding=True)
  policy = qwen2.Qwen2(config, rngs=nnx.Rngs(seed))
  # Tied embeddings of unit variance make every policy repeat its last token with probability 1.
  embedding = policy.embedder.input_embedding
  embedding.value = embedding.value * 0.02
  return policy


def make_cluster(tok, *, cache: int, new_tokens: int = W.new_tokens, prompt: int = W.prompt_length,
                 engine='vanilla', minibatch: int | None = None, log_probs: bool = False):
  """Returns tunix's bundle of actor, sampler and trainer on one device."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('fsdp', 'tp'))
  roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
  config = rl_cluster.ClusterConfig(
      role_to_mesh={role: mesh for role in roles}, rollout_engine=engine, offload_to_cpu=False,
      training_config=rl_cluster.RLTrainingConfig(
          actor_optimizer=optax.adamw(1e-5), eval_every_n_steps=10**9, max_steps=10**6,
          mini_batch_size=minibatch, train_micro_batch_size=minibatch),
      rollout_config=base_rollout.RolloutConfig(
          max_tokens_to_generate=new_tokens, max_prompt_length=prompt, kv_cache_size=cache,
          temperature=1.0, top_p=1.0, top_k=None, eos_tokens=_NEVER, return_logprobs=log_probs))
  return rl_cluster.RLCluster(actor=make_policy(), reference=None, tokenizer=tok,
                              cluster_config=config)


def make_learner(cluster) -> grpo_learner.GRPOLearner:
  """Returns the learner of single-turn tasks."""
  config = grpo_learner.GRPOConfig(num_generations=W.group, num_iterations=1, beta=0.0)
  return grpo_learner.GRPOLearner(cluster, algo_config=config, reward_fns=reward)


def parameters(cluster) -> int:
  """Returns how many numbers the policy has."""
  state = nnx.state(cluster.actor_trainer.model, nnx.Param)
  return sum(leaf.size for leaf in jax.tree.leaves(state))


def reward(prompts, completions, **unused) -> list[float]:
  """Returns rewards that vary within a group, so that advantages are not zero."""
  return [float(sum(map(ord, text)) % 7) for text in completions]


def prompt_texts(tok) -> list[str]:
  return [common.text_of_length(tok, W.prompt_length, i) for i in range(W.prompts)]


class Log:
  """Notes when a cluster generates and updates."""

  def __init__(self, cluster):
    self.generations: list[tuple[float, float, int]] = []  # start, end, tokens
    self.updates: list[tuple[float, float]] = []
    generate, update = cluster.generate, cluster.update_actor

    def logged_generate(*args, **kwargs):
      start = time.perf_counter()
      out = generate(*args, **kwargs)
      self.generations.append((start, time.perf_counter(), sum(map(len, out.tokens))))
      return out

    def logged_update(*args, **kwargs):
      start = time.perf_counter()
      out = update(*args, **kwargs)
      jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
      self.updates.append((start, time.perf_counter()))
      return out

    cluster.generate, cluster.update_actor = logged_generate, logged_update


def decode(tok, reps: int) -> dict:
  """Samples 64 tokens for 8 prompts of 4 samples, prefill included."""
  cluster = make_cluster(tok, cache=W.prompt_length + W.new_tokens)
  prompts = [p for p in prompt_texts(tok) for _ in range(W.group)]
  out, times = common.timed(lambda: cluster.generate(prompts), reps)
  tokens = sum(map(len, out.tokens))
  assert tokens == W.batch * W.new_tokens, tokens
  return {**times, 'tokens': tokens, 'parameters': parameters(cluster)}


def update(tok, reps: int) -> dict:
  """One GRPO update on 32 sequences of 128 tokens: forward, backward, AdamW."""
  cluster = make_cluster(tok, cache=W.prompt_length + W.new_tokens)
  make_learner(cluster)  # sets the cluster's loss
  random = np.random.default_rng(0)
  shape = (W.batch, W.prompt_length + W.new_tokens)
  ids = jnp.asarray(random.integers(len(common.SPECIAL), W.vocabulary, shape), jnp.int32)
  example = grpo_learner.TrainExample(
      prompt_ids=ids[:, :W.prompt_length], prompt_mask=jnp.ones((W.batch, W.prompt_length), bool),
      completion_ids=ids[:, W.prompt_length:],
      completion_mask=jnp.ones((W.batch, W.new_tokens), bool),
      advantages=jnp.asarray(random.standard_normal(W.batch), jnp.float32),
      ref_per_token_logps=None, old_per_token_logps=None)

  def step():
    cluster.update_actor([example], None, False)
    jax.block_until_ready(nnx.state(cluster.actor_trainer.model))

  _, times = common.timed(step, reps)
  return {**times, 'tokens': ids.size, 'parameters': parameters(cluster)}


def iteration(tok, reps: int) -> dict:
  """Rollout, reward and update by the learner's own loop, from the end of an update to the next."""
  cluster = make_cluster(tok, cache=W.prompt_length + W.new_tokens)
  log = Log(cluster)
  learner = make_learner(cluster)
  texts = np.array(prompt_texts(tok))
  start = time.perf_counter()
  learner.train([{'prompts': texts, 'answer': texts} for _ in range(reps + 2)])
  ends = [start] + [end for _, end in log.updates]
  steps = np.diff(ends).tolist()
  return {**common.summary(steps[2:], first_seconds=steps[0]), 'parameters': parameters(cluster),
          'tokens': W.batch * (W.prompt_length + W.new_tokens)}


def three_turns(tok, reps: int) -> dict:
  """Three turns by hand: text in, text out, the whole history prefilled again at each turn."""
  cluster = make_cluster(tok, cache=512)
  observation = common.text_of_length(tok, W.observation_length, 77)
  first = [p for p in prompt_texts(tok) for _ in range(W.group)]
  turns: list[list[float]] = []

  def roll():
    history, tokens, seconds = list(first), 0, []
    for _ in range(W.turns):
      start = time.perf_counter()
      out = cluster.generate(history)
      seconds.append(time.perf_counter() - start)
      tokens += sum(map(len, out.tokens))
      history = [h + text + observation for h, text in zip(history, out.text)]
    turns.append(seconds)
    return tokens

  tokens, times = common.timed(roll, reps)
  return {**times, 'tokens': tokens, 'parameters': parameters(cluster),
          'turn_seconds': np.median(turns[1:], axis=0).tolist()}


class ThreeTurnEnvironment(base_environment.BaseTaskEnv):
  """Answers each turn but the last with the same 16 tokens, at once."""

  observation = ''

  def __init__(self, single_example, *, max_steps=W.turns, **kwargs):
    super().__init__(task=single_example, max_steps=max_steps, **kwargs)

  def _initial_observation(self):
    return {'prompts': str(np.asarray(self.task['prompts']).reshape(-1)[0])}

  def _step_impl(self, action):
    last = self.step_count >= self.max_steps
    return base_environment.EnvStepResult(
        observation={} if last else self.observation,
        reward=reward(None, [str(action)])[0] if last else 0.0, done=last, info={})


class CappedRollout(vanilla_rollout.VanillaRollout):
  """The vanilla sampler, ending a turn after 64 tokens: the stock one has no limit by turn."""

  def __init__(self, rollout_actor, tokenizer, mesh, rollout_config):
    config = rollout_actor.config
    super().__init__(rollout_actor, tokenizer, base_rollout.CacheConfig(
        cache_size=rollout_config.kv_cache_size, num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim))

  def generate(self, prompts, rollout_config, **kwargs):
    limit = min(W.new_tokens, rollout_config.max_tokens_to_generate)
    capped = dataclasses.replace(rollout_config, max_tokens_to_generate=limit)
    return super().generate(prompts, capped, **kwargs)


def three_turns_agentic(tok, reps: int) -> dict:
  """Three turns by the agentic learner; a rollout lasts from its first generation to its last."""
  length = W.turns * W.new_tokens + (W.turns - 1) * (W.observation_length + 16)  # chat markers
  cluster = make_cluster(tok, cache=1024, new_tokens=length, prompt=2 * W.prompt_length,
                         engine=CappedRollout, minibatch=W.prompts, log_probs=True)
  log = Log(cluster)
  ThreeTurnEnvironment.observation = common.text_of_length(tok, W.observation_length, 77)
  learner = agentic_grpo_learner.GRPOLearner(
      cluster,
      algo_config=agentic_grpo_learner.GRPOConfig(
          num_generations=W.group, num_iterations=1, beta=0.0, max_response_length=length,
          max_concurrency=W.batch, system_prompt='', use_rollout_logps=True,
          reward_manager='agentic-sequence-level'),
      reward_fns=lambda prompts, completions, **unused: reward(prompts, completions),
      chat_parser=chat_parser.QwenChatTemplateParser(tok), env_class=ThreeTurnEnvironment,
      agent_class=model_agent.ModelAgent)
  texts = np.array(prompt_texts(tok))
  learner.train([{'prompts': texts, 'answer': texts} for _ in range(reps + 1)])
  seconds, tokens, previous = [], [], 0.0
  for start, end in log.updates:
    calls = [call for call in log.generations if previous <= call[0] < start]
    previous = end
    if calls:
      seconds.append(max(call[1] for call in calls) - min(call[0] for call in calls))
      tokens.append(sum(call[2] for call in calls))
  return {**common.summary(seconds[1:], first_seconds=seconds[0]), 'tokens': int(np.median(tokens)),
          'generate_calls': len(log.generations), 'parameters': parameters(cluster)}


PHASES = {f.__name__: f for f in (decode, update, iteration, three_turns, three_turns_agentic)}

if __name__ == '__main__':
  args = common.arguments(__doc__, PHASES)
  result = PHASES[args.phase](common.tokenizer(), args.reps)
  common.report('tunix', args, ['google-tunix', 'jax', 'flax', 'optax'], result)
  os._exit(0)  # the agentic learner leaves threads running
