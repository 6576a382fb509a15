#!/usr/bin/env bash
# Queues a run on a Slurm cluster: one process a node, with all of its GPUs.
#
#   bash launch/slurm.sh --config=configs/qwen3_8b_grpo.py --workdir=/shared/runs/1 --nodes=2 -- --config.seed=1
#
#   --config, --workdir    of agentrl; the workdir must be seen by all nodes
#   --nodes                1
#   --gpus-per-node        8
#   --cpus-per-node        of the process and its tools; the cluster's default
#   --time                 24:00:00; two minutes before it is over the run saves itself and queues again
#   --partition, --account the cluster's defaults
#   --name                 agentrl
#   --python               .venv/bin/python, seen from this folder's parent, which all nodes must see
#   --dry-run              prints what sbatch would be given
#   -- ...                 further arguments of agentrl
#
# Stop a run with `scancel --signal=TERM JOB`: it ends after the step in progress. The same command goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/lib.sh

NODES=1 GPUS_PER_NODE=8 CPUS_PER_NODE='' TIME=24:00:00 PARTITION='' ACCOUNT='' NAME=agentrl PYTHON=.venv/bin/python
parse_flags 'config workdir nodes gpus-per-node cpus-per-node time partition account name python' "$@"
require config workdir
require_number nodes gpus-per-node

# Exit code of a run that was stopped and has saved itself.
stopped=75

run_with_input sbatch <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=$NAME
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$GPUS_PER_NODE
${CPUS_PER_NODE:+#SBATCH --cpus-per-task=$CPUS_PER_NODE
}${PARTITION:+#SBATCH --partition=$PARTITION
}${ACCOUNT:+#SBATCH --account=$ACCOUNT
}#SBATCH --time=$TIME
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir=$(quoted "$PWD")

code=0
srun --kill-on-bad-exit=0 $(agentrl_command "$PYTHON" --distributed=on --stopped_exit_code=$stopped) || code=\$?
if ((code == $stopped)); then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit \$code
JOB
