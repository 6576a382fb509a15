"""Starting a run of several processes: who they are and where they meet, by flags, environment or cluster.

    processes.define_flags()             at import, before absl parses
    processes.start_from_flags()         before anything asks jax for a device

Each process drives devices of one machine. Slurm, Open MPI, TPU pods and indexed Kubernetes jobs are known to jax;
anywhere else three flags, or variables of the environment, say the same.
"""

from __future__ import annotations

import os
from typing import Any, Mapping, NamedTuple, Sequence

from absl import flags
from absl import logging
import jax

MODES = ('auto', 'on', 'off')
_EXPLICIT = {'coordinator_address': 'JAX_COORDINATOR_ADDRESS', 'num_processes': 'JAX_NUM_PROCESSES',
             'process_id': 'JAX_PROCESS_ID'}
_LOCAL_DEVICES = 'JAX_LOCAL_DEVICE_IDS'
# A process that ends by an exception waits so long for the others before all are ended, seconds.
_SHUTDOWN_SECONDS = 30


class StartError(ValueError):
  """The processes of a run cannot be found or cannot meet, worded for whoever started it."""


class Settings(NamedTuple):
  """One process among those of a run.

  Attributes:
    coordinator_address: 'host:port' of the first process, which all reach.
    num_processes: How many there are.
    process_id: This one's number, from 0.
    local_device_ids: GPUs of the machine that are this process's; None for all.
  """

  coordinator_address: str
  num_processes: int
  process_id: int
  local_device_ids: tuple[int, ...] | None = None


def define_flags():
  """Defines the flags that `start_from_flags` reads."""
  flags.DEFINE_enum('distributed', 'auto', MODES, 'Whether this is one process of several: "auto" asks the cluster '
                    '(TPU pod, Slurm, Open MPI, indexed Kubernetes job), "on" insists, "off" runs alone.')
  flags.DEFINE_string('coordinator_address', None, 'host:port of process 0, or JAX_COORDINATOR_ADDRESS; needed where '
                      'the cluster does not tell.')
  flags.DEFINE_integer('num_processes', None, 'Processes of the run, or JAX_NUM_PROCESSES; likewise.')
  flags.DEFINE_integer('process_id', None, 'Number of this process from 0, or JAX_PROCESS_ID; likewise.')
  flags.DEFINE_list('local_device_ids', None, 'GPUs of this machine that are this process\'s, or '
                    f'{_LOCAL_DEVICES}; all if it is the only process there.')


def start_from_flags() -> Settings | None:
  """Starts what the flags say, see `start`."""
  found = flags.FLAGS
  return start(found.distributed, coordinator_address=found.coordinator_address, num_processes=found.num_processes,
               process_id=found.process_id, local_device_ids=found.local_device_ids)


def start(mode: str = 'auto', **explicit: Any) -> Settings | None:
  """Joins the other processes of the run, if there are any; call it before anything asks jax for a device.

  Blocks until all have come, five minutes at most.

  Args:
    mode: See `settings`.
    **explicit: Likewise.
  Returns:
    Who this process is; None if it runs alone.
  Raises:
    StartError: see `settings`; also if the others cannot be reached.
  """
  found = settings(mode, **explicit)
  if found is None:
    return None
  logging.info('Process %d of %d; process 0 is at %s', found.process_id, found.num_processes,
               found.coordinator_address)
  # Fake or real CPU devices talk to those of other processes through this library only.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(**found._asdict(), cluster_detection_method='deactivate',
                               shutdown_timeout_seconds=_SHUTDOWN_SECONDS)
  except RuntimeError as error:
    raise StartError(f'process {found.process_id} of {found.num_processes} cannot join the others at '
                     f'{found.coordinator_address}: {error}') from error
  return found


def settings(mode: str = 'auto', *, coordinator_address: str | None = None, num_processes: int | None = None,
             process_id: int | None = None, local_device_ids: Sequence[int | str] | None = None,
             environ: Mapping[str, str] | None = None) -> Settings | None:
  """Returns who this process is, or None if it runs alone.

  What is given counts before the environment, and the environment before what the cluster tells.

  Args:
    mode: 'auto', 'on' or 'off'; see `define_flags`.
    coordinator_address: See `Settings`; so are the next three. None if not given.
    num_processes: Likewise.
    process_id: Likewise.
    local_device_ids: Likewise.
    environ: Read instead of the environment, but by what jax knows of clusters.
  Raises:
    StartError: naming what is missing, or is not possible, and what would do.
  """
  if mode not in MODES:
    raise StartError(f'distributed={mode!r} is none of {", ".join(MODES)}')
  if mode == 'off':
    return None
  environ = os.environ if environ is None else environ
  given = dict(coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id)
  given = {name: _from_environment(name, value, environ) for name, value in given.items()}
  if local_device_ids is None and environ.get(_LOCAL_DEVICES):
    local_device_ids = environ[_LOCAL_DEVICES].split(',')
  local = None if local_device_ids is None else tuple(_whole('local_device_ids', i) for i in local_device_ids)
  missing = [name for name, value in given.items() if value is None]
  if missing:
    try:
      cluster = _cluster()
      if cluster is None or (mode == 'auto' and cluster.get_process_count() == 1 and len(missing) == len(given)):
        return _alone(mode, missing, len(missing) == len(given))
      given, told = _ask(cluster, given)
    except (RuntimeError, OSError, LookupError) as error:
      raise StartError(f'this seems to be part of a cluster, which does not tell which part: {error}. Give all of '
                       '--coordinator_address, --num_processes and --process_id, or --distributed=off') from error
    local = local or told
  return _checked(Settings(**given, local_device_ids=local))


def _alone(mode: str, missing: list[str], nothing_given: bool) -> None:
  if nothing_given and mode == 'auto':
    return
  named = ', '.join(f'--{name} ({_EXPLICIT[name]})' for name in missing)
  raise StartError(f'the processes of the run cannot be found: no cluster that jax knows tells, and {named} is not '
                   'given. Give all of --coordinator_address, --num_processes and --process_id, or --distributed=off')


def _from_environment(name: str, value: Any, environ: Mapping[str, str]) -> Any:
  if value is None:
    value = environ.get(_EXPLICIT[name]) or None
  return value if value is None or name == 'coordinator_address' else _whole(name, value)


def _whole(name: str, value: Any) -> int:
  try:
    return int(value)
  except ValueError:
    raise StartError(f'{name}={value!r} is no whole number') from None


def _cluster() -> Any:
  """Returns jax's description of the cluster that this process is in; None if it is in none."""
  from jax._src import clusters  # pylint: disable=g-import-not-at-top  # jax has no public way to it
  for kind in clusters.ClusterEnv._cluster_types:  # pylint: disable=protected-access
    # Of a Kubernetes pod that belongs to no indexed job there is nothing to ask, and no right to ask it.
    indexed = 'K8s' not in kind.__name__ or 'JOB_COMPLETION_INDEX' in os.environ
    if not kind.opt_in_only_method and indexed and kind.is_env_present():
      return kind
  return None


def _ask(cluster: Any, given: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...] | None]:
  """Returns what a cluster tells where nothing is given, and the GPUs that it means for this process."""
  from jax._src import clusters  # pylint: disable=g-import-not-at-top
  *told, local = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      *given.values(), None, cluster.name or None, 300)
  # jax takes it that there is a process a GPU; the only one of its machine has them all.
  if os.environ.get('SLURM_NTASKS') == os.environ.get('SLURM_STEP_NUM_NODES', ''):
    local = None
  if os.environ.get('OMPI_COMM_WORLD_LOCAL_SIZE') == '1':
    local = None
  return dict(zip(given, told)), None if local is None else tuple(local)


def _checked(found: Settings) -> Settings | None:
  host, _, port = found.coordinator_address.rpartition(':')
  if not host or not port.isdigit():
    raise StartError(f'coordinator_address={found.coordinator_address!r} is no host:port, such as 10.0.0.1:8476')
  if found.num_processes < 1:
    raise StartError(f'num_processes={found.num_processes} must be at least 1')
  if not 0 <= found.process_id < found.num_processes:
    raise StartError(f'process_id={found.process_id} must be between 0 and {found.num_processes - 1}, as '
                     f'num_processes={found.num_processes}')
  return found if found.num_processes > 1 else None
