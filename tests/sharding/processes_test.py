"""Tests of who a process finds it is: what is given, what the environment says, what jax knows of the cluster.

Expected values are those that the clusters document for their variables.
"""

from __future__ import annotations

import pytest

from agentrl.sharding import processes
from agentrl.sharding.processes import Settings, settings

EXPLICIT = dict(coordinator_address='10.0.0.1:8476', num_processes=4, process_id=2)
SLURM = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'node[003-004]', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '3',
         'SLURM_LOCALID': '1', 'SLURM_STEP_NUM_NODES': '2'}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
  """Hides the cluster that the tests may themselves run in."""
  for name in (*SLURM, 'JOB_COMPLETION_INDEX', 'OMPI_MCA_orte_hnp_uri', 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES',
               'JAX_PROCESS_ID', 'JAX_LOCAL_DEVICE_IDS', 'TPU_WORKER_HOSTNAMES'):
    monkeypatch.delenv(name, raising=False)


@pytest.fixture
def slurm(monkeypatch):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)


def test_what_is_given_comes_before_the_environment():
  environ = {'JAX_COORDINATOR_ADDRESS': 'other:1', 'JAX_NUM_PROCESSES': '8', 'JAX_PROCESS_ID': '5',
             'JAX_LOCAL_DEVICE_IDS': '0,1'}
  assert settings(**EXPLICIT, environ={}) == Settings('10.0.0.1:8476', 4, 2)
  assert settings(environ=environ) == Settings('other:1', 8, 5, (0, 1))
  assert settings(process_id=7, local_device_ids=['3'], environ=environ) == Settings('other:1', 8, 7, (3,))


def test_alone_nothing_is_started():
  assert settings(environ={}) is None
  assert settings('off', **EXPLICIT) is None
  assert settings(**{**EXPLICIT, 'num_processes': 1, 'process_id': 0}, environ={}) is None


def test_slurm_tells_all_of_it(slurm, monkeypatch):
  # jax takes the port from the job's number, and a GPU a process.
  assert settings() == Settings(f'node003:{7 + 65535 - 2**12 + 1}', 4, 3, (1,))
  assert settings(coordinator_address='head:99', local_device_ids=[0, 1]) == Settings('head:99', 4, 3, (0, 1))
  # The only process of its machine has all of its GPUs.
  monkeypatch.setenv('SLURM_NTASKS', '2')
  monkeypatch.setenv('SLURM_PROCID', '1')
  monkeypatch.setenv('SLURM_LOCALID', '0')
  assert settings()[1:] == (2, 1, None)


def test_a_job_of_one_process_runs_alone(slurm, monkeypatch):
  monkeypatch.setenv('SLURM_NTASKS', '1')
  monkeypatch.setenv('SLURM_PROCID', '0')
  assert settings() is None and settings('off') is None


def test_a_pod_of_no_indexed_job_is_asked_nothing(monkeypatch, recwarn):
  monkeypatch.setenv('KUBERNETES_SERVICE_HOST', '10.0.0.1')
  assert settings() is None and not recwarn.list


@pytest.mark.parametrize('given, words', [
    (dict(num_processes=2, process_id=1), r'--coordinator_address \(JAX_COORDINATOR_ADDRESS\) is not given'),
    (dict(mode='on'), 'no cluster that jax knows tells, and --coordinator_address'),
    (dict(mode='perhaps'), "distributed='perhaps' is none of auto, on, off"),
    ({**EXPLICIT, 'process_id': 4}, 'process_id=4 must be between 0 and 3, as num_processes=4'),
    ({**EXPLICIT, 'num_processes': 0}, 'num_processes=0 must be at least 1'),
    ({**EXPLICIT, 'coordinator_address': 'head'}, "coordinator_address='head' is no host:port"),
    ({**EXPLICIT, 'local_device_ids': ['a']}, "local_device_ids='a' is no whole number"),
])
def test_what_cannot_be_is_refused_by_name(given, words):
  with pytest.raises(ValueError, match=words):
    settings(**given, environ={})


def test_flags_of_one_process_start_nothing():
  assert processes.start('auto', coordinator_address='head:1', num_processes=1, process_id=0) is None
