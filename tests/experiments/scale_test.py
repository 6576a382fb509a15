"""Tests of what is read off compiled programs, on HLO written by hand whose figures are derived beside it."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def hlo():
  spec = importlib.util.spec_from_file_location('scale_hlo', ROOT / 'experiments' / 'scale' / 'hlo.py')
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look their module up
  spec.loader.exec_module(module)
  yield module
  del sys.modules[spec.name]


# A loop of 6 in steps of 2, so 3 rounds, each with one product of [8,16] and [16,32], an all-reduce among 4 chips, and
# an all-gather that is started in one fusion and ended in another.
LOOP = """HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias), {1}: (2, {}, may-alias) }, x={()}

%start (p.0: bf16[4,8]) -> bf16[16,8] {
  %p.0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%p.0), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}, frontend_attributes={chain_id="3"}
}

%done (p.1: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}, frontend_attributes={chain_id="3"}
}

%body (arg: (s32[], f32[8,16], f32[16,32])) -> (s32[], f32[8,16], f32[16,32]) {
  %arg = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %a = f32[8,16]{1,0} get-tuple-element(%arg), index=1
  %b = f32[16,32]{1,0} get-tuple-element(%arg), index=2
  %dot = f32[8,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[8,32]{1,0} all-reduce(%dot), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %w = bf16[4,8]{1,0} constant({...})
  %s = bf16[16,8]{1,0} fusion(%w), kind=kCustom, calls=%start
  %d = bf16[16,8]{1,0} fusion(%w), kind=kCustom, calls=%done
  ROOT %out = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}) tuple(%next, %a, %b)
}

%condition (arg.1: (s32[], f32[8,16], f32[16,32])) -> pred[] {
  %arg.1 = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%arg.1), index=0
  %six = s32[] constant(6)
  ROOT %less = pred[] compare(%j, %six), direction=LT
}

ENTRY %main (x: s32[], y: f32[8,16], z: f32[16,32]) -> (f32[8,16], f32[16,32]) {
  %x = s32[] parameter(0)
  %y = f32[8,16]{1,0} parameter(1)
  %z = f32[16,32]{1,0} parameter(2)
  %start.1 = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}) tuple(%x, %y, %z)
  %while = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}) while(%start.1), condition=%condition, body=%body
  %left = f32[8,16]{1,0} get-tuple-element(%while), index=1
  %copy.1 = f32[8,16]{1,0} copy(%left)
  %fetch = (f32[16,32]{1,0:S(1)}, f32[16,32]{1,0}, u32[]{:S(2)}) copy-start(%z)
  %fetched = f32[16,32]{1,0:S(1)} copy-done(%fetch)
  ROOT %both = (f32[8,16]{1,0}, f32[16,32]{1,0}) tuple(%copy.1, %fetched)
}
"""


def test_loops_count_as_often_as_they_run_and_split_collectives_once_a_round(hlo):
  cost = hlo.analyse(LOOP)
  assert cost.flops == 3 * 2 * 8 * 16 * 32
  # As rings: twice 3/4 of 8 x 32 floats; 3/4 of the 16 x 8 bfloat16 that each ends up with.
  assert cost.collective_bytes == {'all-reduce': 3 * 2 * 0.75 * 8 * 32 * 4, 'all-gather': 3 * 0.75 * 16 * 8 * 2}


def test_a_loop_without_a_known_end_runs_as_often_as_is_said(hlo):
  text = LOOP.replace('constant(6)', 'parameter(1)')
  assert hlo.analyse(text, loops=(5,)).flops == 5 * 2 * 8 * 16 * 32


def test_copies_of_donated_buffers_are_found_but_not_what_goes_to_on_chip_memory(hlo):
  donated = hlo.donated(LOOP)
  assert {n: t.partition('{')[0] for n, t in donated.items()} == {1: 'f32[8,16]', 2: 'f32[16,32]'}
  assert hlo.copies_of(LOOP, donated.values(), at_least=1) == {'f32[8,16]': 8 * 16 * 4}
  assert not hlo.copies_of(LOOP, donated.values())  # all of them are small


def test_the_largest_array_is_of_memory_not_of_what_stays_inside_fusions(hlo):
  assert hlo.largest(LOOP, 32) == (16 * 32, 'f32[16,32]')
  assert hlo.largest(LOOP, 32, without=[8]) == (16 * 32, 'f32[16,32]')
  assert hlo.largest(LOOP, 32, without=[16]) == (8 * 32, 'f32[8,32]')
  assert hlo.largest(LOOP, 7) == (0, '')
  assert hlo.largest_collective(LOOP)[0] == 8 * 32 * 4


def test_bytes_are_what_fusions_read_and_write_in_main_memory(hlo):
  text = """HloModule m

%cut (p: f32[64,128], q: s32[]) -> f32[1,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %q = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = f32[1,128]{1,0} dynamic-slice(%p, %q, %zero), dynamic_slice_sizes={1,128}
}

ENTRY %main (x: f32[64,128], i: s32[]) -> f32[1,128] {
  %x = f32[64,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %near = f32[64,128]{1,0:S(1)} add(%x, %x)
  ROOT %row = f32[1,128]{1,0} fusion(%x, %i), kind=kLoop, calls=%cut
}
"""
  # The sum reads x twice and writes on the chip; the fusion reads one row of x and the index, and writes a row.
  assert hlo.analyse(text).hbm_bytes == 2 * 64 * 128 * 4 + 128 * 4 + 4 + 128 * 4


def test_what_is_fetched_or_written_in_place_counts_by_its_part(hlo):
  text = """HloModule m

%put (p: f32[64,128], q: s32[2,1], r: f32[2,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %q = s32[2,1]{1,0} parameter(1)
  %r = f32[2,128]{1,0} parameter(2)
  ROOT %set = f32[64,128]{1,0} scatter(%p, %q, %r), to_apply=%assign
}

ENTRY %main (x: f32[64,128], i: s32[2,1], r: f32[2,128]) -> f32[64,128] {
  %x = f32[64,128]{1,0} parameter(0)
  %i = s32[2,1]{1,0:S(1)} parameter(1)
  %r = f32[2,128]{1,0:S(1)} parameter(2)
  %s = ((f32[64,128]{1,0}), f32[16,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:16], [0:128]}
  %sd = f32[16,128]{1,0:S(1)} slice-done(%s)
  %c = (f32[64,128]{1,0:S(1)}, f32[64,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %cd = f32[64,128]{1,0:S(1)} copy-done(%c)
  ROOT %new = f32[64,128]{1,0} fusion(%x, %i, %r), kind=kCustom, calls=%put
}
"""
  # 16 rows and all 64 are read onto the chip; 2 rows are written, and, as an estimate has it, their places read.
  assert hlo.analyse(text).hbm_bytes == (16 + 64 + 2 + 2) * 128 * 4


@pytest.mark.parametrize('labels, window, left, right, out, taps', [
    ('bf_io->bf', '', '[8,16]', '[16,32]', '[8,32]', 1),
    # A batch of 4 products as a dilated dimension: of the 4 x 4 taps the 4 on the diagonal meet something.
    ('0bf_0io->0bf', ', window={size=4 stride=3 pad=3_3 lhs_dilate=4}', '[4,8,16]', '[4,16,32]', '[4,8,32]', 4),
])
def test_products_written_as_convolutions_count_what_meets(hlo, labels, window, left, right, out, taps):
  text = f"""HloModule m

ENTRY %main (a: f32{left}, b: f32{right}) -> f32{out} {{
  %a = f32{left}{{1,0}} parameter(0)
  %b = f32{right}{{1,0}} parameter(1)
  ROOT %c = f32{out}{{1,0}} convolution(%a, %b){window}, dim_labels={labels}
}}
"""
  assert hlo.analyse(text).flops == taps * 2 * 8 * 16 * 32


def test_kernels_count_what_is_known_of_them_and_others_are_refused(hlo):
  text = """HloModule m

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %gmm.3 = f32[8,16]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
}
"""
  cost = hlo.analyse(text, kernel_flops={'gmm': lambda i, types: float(hlo.num_bytes(types[i.operands[0]]))})
  assert cost.flops == 8 * 16 * 4 and cost.kernels == {'gmm': 1}
  # What is not said to be otherwise reads its operands and writes its results once.
  assert cost.hbm_bytes == 2 * 8 * 16 * 4
  nothing = lambda *_: 0.0
  assert hlo.analyse(text, kernel_flops={'gmm': nothing}, kernel_bytes={'gmm': lambda *_: 7.0}).hbm_bytes == 7
  with pytest.raises(ValueError, match="'gmm.3'; known: splash"):
    hlo.analyse(text, kernel_flops={'splash': lambda *_: 0.0})


_SMALL = """
import dataclasses, json
from experiments.scale import cases, compile
model = dataclasses.replace(cases.QWEN3_8B, vocab_size=1024, known_tokens=1000, num_layers=2, width=256, ff_width=512,
                            num_heads=4, num_kv_heads=2, logit_chunk=256)
case = cases.Case('small', model, 'v5e-4', 'v5e:2x2', dict(fsdp=2, tensor=2), 2, 'v5e:2x2', dict(tensor=2, expert=2), 4,
                  context=1024, prompts=2, group_size=2, chunk=4, extend_tokens=128)
print(json.dumps({p: compile.compiled(case, p) for p in compile.PROGRAMS}))
"""


def test_small_programs_compile_for_a_tpu_that_is_not_there():
  pytest.importorskip('libtpu')
  environment = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
  environment['PYTHONPATH'] = os.pathsep.join([str(ROOT), environment.get('PYTHONPATH', '')])
  done = subprocess.run([sys.executable, '-c', _SMALL], env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2_000:]
  found = json.loads(done.stdout.splitlines()[-1])
  for program, result in found.items():
    checks = result['checks']
    assert not checks['logits']['is_whole'] and not checks['collective']['is_cache'], (program, checks)
    assert not checks['donated']['copies'], (program, checks)
    assert result['bytes']['aliased'] >= checks['donated']['bytes'] > 0
    assert 0 < result['bytes']['peak'] < 1e9
  # A chip's share is 1,024 tokens of: 2 layers of 256 x ((4 + 2 x 2) x 128 + 4 x 128 + 3 x 512) parameters and a head of
  # 256 x 1,024, each forward, twice backward and, but for the last product of a layer, forward once more.
  # Attention: 2 products forward, twice, and 3 + 4 backward, of 2 heads of 128 in 3 blocks of 512 x 512, in 2 layers and
  # 2 passes.
  last = 2 * 256 * 512
  parameters = 2 * 256 * (8 * 128 + 4 * 128 + 3 * 512) + 256 * 1_024
  attention = 11 * 2 * 2 * 128 * 3 * 512**2 * 2 * 2
  assert found['update']['flops'] == pytest.approx(2 * 1_024 * (4 * parameters - last) + attention, rel=0.02)
  # Of the last layer extend wants keys and values only.
  assert found['extend']['kernels'] == {'attend_rows': 1} and found['decode']['kernels'] == {'attend_slots': 4 * 2}
  # 4 steps: half of the parameters for 2 slots a chip, and its 16 blocks of 128 tokens, scores and sums for 2 heads each.
  products, attended = 2 * 2 * parameters // 2, 2 * 2 * 2 * 16 * 2 * 128 * 128
  assert found['decode']['flops'] == pytest.approx(4 * (products + attended), rel=0.05)
