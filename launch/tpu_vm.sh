#!/usr/bin/env bash
# Runs on a TPU slice by gcloud: makes it if asked to, copies this commit to all of its hosts, installs, runs.
#
#   bash launch/tpu_vm.sh --name=mine --zone=us-east5-a --create=v6e-16 --nfs=10.0.0.2:/share \
#     --config=configs/qwen3_8b_grpo.py --workdir=/mnt/share/runs/1 -- --config.seed=1
#
#   --name, --zone         of the slice
#   --project              gcloud's default
#   --create               accelerator type, such as v6e-16; without it the slice must exist
#   --runtime-version      v2-alpha-tpuv6e, of the slice that is made
#   --spot                 true for one that may be taken away
#   --nfs                  HOST:/SHARE that is mounted at /mnt/share on all hosts, such as a Filestore instance
#   --config, --workdir    of agentrl; the workdir must be seen by all hosts
#   --dry-run              prints the commands
#   -- ...                 further arguments of agentrl
#
# Stop a run with the signal that jax's processes end together on; it saves itself after the step in progress:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='pkill -TERM -f agentrl.main'
# The same command goes on where it was, on a slice of another size as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/lib.sh

NAME='' PROJECT='' CREATE='' RUNTIME_VERSION=v2-alpha-tpuv6e SPOT=false NFS=''
parse_flags 'name zone project create runtime-version spot nfs config workdir' "$@"
require name zone config workdir
[[ "$SPOT" == true || "$SPOT" == false ]] || refuse "--spot=$SPOT must be true or false"
[[ -z "$NFS" || "$NFS" == ?*:/?* ]] || refuse "--nfs=$NFS must be HOST:/SHARE"
[[ "$WORKDIR" == /* ]] || refuse "--workdir=$WORKDIR must be an absolute path that all hosts see"

where=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all "--command=$1"
}

if [[ -n "$CREATE" ]]; then
  spot=()
  [[ "$SPOT" == false ]] || spot=(--spot)
  run gcloud compute tpus tpu-vm create "$NAME" "${where[@]}" "--accelerator-type=$CREATE" \
    "--version=$RUNTIME_VERSION" ${spot[@]+"${spot[@]}"}
fi
if [[ -n "$NFS" ]]; then
  on_all_hosts "sudo mkdir -p /mnt/share && { mountpoint -q /mnt/share || sudo mount -t nfs $(quoted "$NFS") /mnt/share; }"
fi
archive="${TMPDIR:-/tmp}/agentrl-$NAME.tar.gz"
run git archive --format=tar.gz "--output=$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$NAME:agentrl.tar.gz" "${where[@]}" --worker=all
on_all_hosts "mkdir -p agentrl && tar -xzf agentrl.tar.gz -C agentrl && cd agentrl && python3 -m pip install --quiet --user uv &&\
 python3 -m uv venv --quiet --clear --python 3.12 .venv && python3 -m uv pip install --quiet -e '.[tpu,viz,hf]'"
on_all_hosts "cd agentrl && exec $(agentrl_command .venv/bin/python --distributed=on)"
