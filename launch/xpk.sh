#!/usr/bin/env bash
# Runs on a GKE cluster that xpk made, as an xpk workload.
#
#   bash launch/xpk.sh --cluster=mine --workload=run1 --tpu-type=v5litepod-64 --image=gcr.io/me/agentrl \
#     --storage=share --config=configs/qwen3_8b_grpo.py --workdir=/share/runs/1 -- --config.seed=1
#
#   --cluster, --workload  names
#   --tpu-type             of a slice, such as v5litepod-64
#   --num-slices           1
#   --image                with agentrl installed (pip install '.[tpu,viz,hf]') and its configs in the working folder
#   --storage              attached by `xpk storage attach`; the workdir lies in its mount point
#   --zone, --project      gcloud's defaults
#   --max-restarts         50, after preemptions and failures; the run goes on where it was
#   --config, --workdir    of agentrl; the workdir must be seen by all hosts
#   --dry-run              prints the command
#   -- ...                 further arguments of agentrl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/lib.sh

NUM_SLICES=1 STORAGE='' ZONE='' PROJECT='' MAX_RESTARTS=50
parse_flags 'cluster workload tpu-type num-slices image storage zone project max-restarts config workdir' "$@"
require cluster workload tpu-type image config workdir
require_number num-slices max-restarts

# A stopped run fails, so that it is started again.
run xpk workload create "--cluster=$CLUSTER" "--workload=$WORKLOAD" "--tpu-type=$TPU_TYPE" \
  "--num-slices=$NUM_SLICES" "--docker-image=$IMAGE" "--max-restarts=$MAX_RESTARTS" \
  ${STORAGE:+"--storage=$STORAGE"} ${ZONE:+"--zone=$ZONE"} ${PROJECT:+"--project=$PROJECT"} \
  "--command=$(agentrl_command python3 --distributed=on --stopped_exit_code=75)"
