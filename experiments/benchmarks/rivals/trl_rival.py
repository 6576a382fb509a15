r"""Measures TRL's GRPOTrainer (transformers as the sampler) on the workload of `common.py`.

    taskset -c 0,1 .venv-rivals/bin/python \
        experiments/benchmarks/rivals/trl_rival.py --phase decode --threads 2

Phases: decode (model.generate), update (one optimisation step of the trainer, sampling subtracted),
update_by_hand (the same step in plain torch), iteration (a whole step of the trainer), three_turns
(its tool loop with a tool that returns at once), three_turns_tool (with an async tool of 50 ms).

A randomly initialised policy never writes a tool call. So each turn really decodes its 64 tokens,
and then a scripted call of 64 tokens takes their place: everything that follows (parsing, running
the tool, prefilling the history again, masks) is TRL's own.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TRANSFORMERS_OFFLINE='1',
                  TOKENIZERS_PARALLELISM='false', TRL_EXPERIMENTAL_SILENCE='1',
                  WANDB_DISABLED='true')

import asyncio
import logging
import tempfile
import time
import warnings

warnings.filterwarnings('ignore')
logging.disable(logging.WARNING)

import common
from common import WORKLOAD as W
import datasets
import torch
import transformers
import trl
from trl import chat_template_utils

# The shortest template that TRL's checks accept: history is prefix-preserving, calls are rendered.
_TEMPLATE = """
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{%- set function = {'name': call.function.name, 'arguments': call.function.arguments} -%}
{{- '<tool_call>' + (function | tojson) + '</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def make_tokenizer():
  tok = common.tokenizer()
  tok.chat_template = _TEMPLATE
  tok.response_schema = chat_template_utils.qwen3_schema
  return tok


def make_policy(tok) -> torch.nn.Module:
  """Returns the policy with a tied head, randomly initialised."""
  torch.manual_seed(0)
  config = transformers.Qwen2Config(
      vocab_size=W.vocabulary, hidden_size=W.width, intermediate_size=W.feed_forward,
      num_hidden_layers=W.layers, num_attention_heads=W.heads, num_key_value_heads=W.kv_heads,
      max_position_embeddings=2048, tie_word_embeddings=True, use_cache=True,
      eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, bos_token_id=None)
  policy = transformers.Qwen2ForCausalLM(config).float()
  policy.generation_config.eos_token_id = tok.eos_token_id
  policy.generation_config.pad_token_id = tok.pad_token_id
  return policy


def parameters(policy: torch.nn.Module) -> int:
  """Returns how many numbers the policy has."""
  return sum(p.numel() for p in policy.parameters())


def random_ids(length: int) -> torch.Tensor:
  generator = torch.Generator().manual_seed(1)
  return torch.randint(len(common.SPECIAL), W.vocabulary, (W.batch, length), generator=generator)


def reward(completions, **unused) -> list[float]:
  """Returns rewards that vary within a group, so that advantages are not zero."""
  return [float(i % W.group) for i in range(len(completions))]


class TimedTrainer(trl.GRPOTrainer):
  """The trainer, with its phases timed and its turns scripted.

  Attributes:
    rollouts: Seconds of sampling and scoring, by step.
    steps: Seconds from the start of sampling to the end of the optimiser's step.
    turns: Seconds of model.generate, by step and turn.
    script: Ids put in the place of each turn's; empty for none.
  """

  def __init__(self, *args, script=(), **kwargs):
    self.rollouts, self.steps, self.turns, self.script = [], [], [], script
    super().__init__(*args, **kwargs)

  def _generate_single_turn(self, *args, **kwargs):
    start = time.perf_counter()
    ids, log_probs = super()._generate_single_turn(*args, **kwargs)
    assert {len(row) for row in ids} == {W.new_tokens}, {len(row) for row in ids}
    if self.script:
      ids = [list(self.script[len(self.turns[-1])]) for _ in ids]
    self.turns[-1].append(time.perf_counter() - start)
    return ids, log_probs

  def _generate_and_score_completions(self, inputs):
    self.started = time.perf_counter()
    self.turns.append([])
    out = super()._generate_and_score_completions(inputs)
    self.rollouts.append(time.perf_counter() - self.started)
    self.completion_length = out['completion_ids'].shape[1]
    self.prompt_length = out['prompt_ids'].shape[1]
    return out


class _StepEnd(transformers.TrainerCallback):
  """Notes when the optimiser's step is done."""

  trainer: TimedTrainer

  def on_step_end(self, *args, **kwargs):
    self.trainer.steps.append(time.perf_counter() - self.trainer.started)


def train(tok, steps: int, tools=(), script=()) -> TimedTrainer:
  """Returns a trainer that has taken some steps of 8 prompts with 4 samples of 64 tokens a turn."""
  wrap = lambda text: f'<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n'
  texts = [common.text_of_length(tok, W.prompt_length, i, wrap) for i in range(W.prompts)]
  rows = [{'prompt': [{'role': 'user', 'content': text}]} for text in texts]
  callback = _StepEnd()
  callback.trainer = TimedTrainer(
      model=make_policy(tok), reward_funcs=reward, processing_class=tok, tools=list(tools) or None,
      train_dataset=datasets.Dataset.from_list(rows), callbacks=[callback], script=script,
      args=trl.GRPOConfig(
          output_dir=tempfile.mkdtemp(prefix='trl-rival-'), per_device_train_batch_size=W.batch,
          num_generations=W.group, max_steps=steps, max_completion_length=512, learning_rate=1e-6,
          beta=0.0, temperature=1.0, top_k=0, max_tool_calling_iterations=W.turns,
          generation_kwargs={'min_new_tokens': W.new_tokens, 'max_new_tokens': W.new_tokens},
          use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, logging_steps=10**6,
          save_strategy='no', report_to=[], disable_tqdm=True, dataloader_num_workers=0))
  callback.trainer.train()
  assert callback.trainer.prompt_length == W.prompt_length, callback.trainer.prompt_length
  return callback.trainer


def decode(tok, reps: int) -> dict:
  """Samples 64 tokens for 32 prompts, prefill included."""
  policy = make_policy(tok).eval()
  ids = random_ids(W.prompt_length)

  @torch.no_grad()
  def sample():
    return policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True,
                           temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=W.new_tokens,
                           max_new_tokens=W.new_tokens)

  out, times = common.timed(sample, reps)
  assert out.shape == (W.batch, W.prompt_length + W.new_tokens), out.shape
  return {**times, 'tokens': W.batch * W.new_tokens, 'parameters': parameters(policy)}


def update(tok, reps: int) -> dict:
  """One optimisation step of the trainer on 32 sequences of 128 tokens."""
  trainer = train(tok, reps + 1)
  seconds = [step - rollout for step, rollout in zip(trainer.steps, trainer.rollouts)]
  return _of_steps(trainer, seconds)


def iteration(tok, reps: int) -> dict:
  """A whole step of the trainer: sampling, scoring, optimisation."""
  trainer = train(tok, reps + 1)
  return _of_steps(trainer, trainer.steps)


def _of_steps(trainer: TimedTrainer, seconds: list[float]) -> dict:
  return {**common.summary(seconds[1:], first_seconds=seconds[0]),
          'tokens': W.batch * (W.prompt_length + W.new_tokens),
          'parameters': parameters(trainer.model)}


def update_by_hand(tok, reps: int) -> dict:
  """The least that a clipped policy-gradient step needs in torch, on 32 sequences of 128 tokens."""
  policy = make_policy(tok).train()
  optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
  ids = random_ids(W.prompt_length + W.new_tokens)
  advantages = torch.randn(W.batch, 1, generator=torch.Generator().manual_seed(2))

  def step():
    logits = policy(input_ids=ids, logits_to_keep=W.new_tokens + 1).logits[:, :-1]
    sampled = ids[:, W.prompt_length:, None]
    log_probs = logits.log_softmax(-1).gather(2, sampled)[..., 0]
    ratio = (log_probs - log_probs.detach()).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

  _, times = common.timed(step, reps)
  return {**times, 'tokens': ids.numel(), 'parameters': parameters(policy)}


def three_turns(tok, reps: int) -> dict:
  """The tool loop: three turns of 64 tokens, 16 tokens of observation, a tool that does nothing."""
  observation = _observation(tok)

  def lookup(key: str) -> str:
    """Looks a key up.

    Args:
      key: What to look for.
    """
    return observation

  return _tool_loop(tok, reps, lookup)


def three_turns_tool(tok, reps: int) -> dict:
  """The same with an async tool that waits 50 ms."""
  observation = _observation(tok)

  async def lookup(key: str) -> str:
    """Looks a key up.

    Args:
      key: What to look for.
    """
    await asyncio.sleep(common.TOOL_SECONDS)
    return observation

  return _tool_loop(tok, reps, lookup)


def _observation(tok) -> str:
  """Returns what the tool says: 16 tokens once the template has wrapped it."""
  wrap = lambda text: f'\n<|im_start|>tool\n{text}<|im_end|>\n<|im_start|>assistant\n'
  return common.text_of_length(tok, W.observation_length, 77, wrap)


def _script(tok) -> list[list[int]]:
  """Returns the ids of each turn: calls, and in the end an answer, all of one length."""
  call = '<tool_call>{"name": "lookup", "arguments": {"key": "a"}}</tool_call>'
  filler = tok.encode(' a')[-1:]
  turns = [tok.encode(text) + [tok.eos_token_id] for text in [call] * (W.turns - 1) + ['done']]
  return [filler * (W.new_tokens - len(turn)) + turn for turn in turns]


def _tool_loop(tok, reps: int, tool) -> dict:
  trainer = train(tok, reps + 1, tools=[tool], script=_script(tok))
  length = W.turns * W.new_tokens + (W.turns - 1) * W.observation_length
  assert trainer.completion_length == length, (trainer.completion_length, length)
  seconds = trainer.rollouts
  turns = torch.tensor(trainer.turns[1:]).median(0).values.tolist()
  return {**common.summary(seconds[1:], first_seconds=seconds[0]), 'turn_seconds': turns,
          'tokens': W.batch * W.turns * W.new_tokens, 'parameters': parameters(trainer.model)}


PHASES = {f.__name__: f for f in (
    decode, update, update_by_hand, iteration, three_turns, three_turns_tool)}

if __name__ == '__main__':
  args = common.arguments(__doc__, PHASES)
  torch.set_num_threads(args.threads)
  result = PHASES[args.phase](make_tokenizer(), args.reps)
  common.report('trl', args, ['trl', 'torch', 'transformers'], result)
