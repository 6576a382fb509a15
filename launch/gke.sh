#!/usr/bin/env bash
# Runs on a GKE cluster as a JobSet: a pod a host, started again together when one fails or is taken away.
#
#   bash launch/gke.sh --name=run1 --image=gcr.io/me/agentrl --claim=share --accelerator=tpu-v6e-slice --topology=4x4 \
#     --hosts=4 --chips-per-host=4 --config=configs/qwen3_8b_grpo.py --workdir=/share/runs/1 -- --config.seed=1
#
#   --name                 of the JobSet
#   --image                with agentrl installed (pip install '.[tpu,viz,hf]', or cuda for tpu) and its configs in the
#                          working folder
#   --accelerator          label of the nodes: tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice, nvidia-h200-141gb, ...
#   --topology             of a TPU slice, such as 4x4; none for GPUs
#   --hosts                of the slice, or machines with GPUs
#   --chips-per-host       TPU chips or GPUs of each: 4
#   --slices               TPU slices, or 1 for GPUs: 1
#   --claim                persistent volume claim, read-write-many, that is mounted at /share
#   --max-restarts         50
#   --namespace            kubectl's default
#   --config, --workdir    of agentrl; the workdir must lie in /share
#   --dry-run              prints the JobSet
#   -- ...                 further arguments of agentrl
#
# The cluster needs the JobSet controller: https://jobset.sigs.k8s.io. `kubectl delete jobset NAME` stops a run, which
# saves itself within the grace period; the same command goes on, with other numbers of hosts as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/lib.sh

NAME='' TOPOLOGY='' HOSTS=1 CHIPS_PER_HOST=4 SLICES=1 MAX_RESTARTS=50 NAMESPACE=''
parse_flags 'name image accelerator topology hosts chips-per-host slices claim max-restarts namespace config workdir' "$@"
require name image accelerator claim config workdir
require_number hosts chips-per-host slices max-restarts
[[ "$NAME" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] \
  || refuse "--name=$NAME must be lower-case letters, digits and dashes, a letter first"
[[ "$WORKDIR" == /share/* ]] || refuse "--workdir=$WORKDIR must lie in /share, where the claim is mounted"

# Prints words as a YAML list, each on a line of its own.
yaml_list() {
  local word
  for word in "$@"; do
    printf "              - '%s'\n" "${word//\'/\'\'}"
  done
}

if [[ "$ACCELERATOR" == tpu-* ]]; then
  require topology
  resource=google.com/tpu
  selector="cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
              cloud.google.com/gke-tpu-topology: $TOPOLOGY"
  # A slice is a node pool, and GKE tells its processes who they are.
  annotations='{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}'
  environment='[]'
else
  [[ -z "$TOPOLOGY" ]] || refuse "--topology=$TOPOLOGY goes with TPUs only, and --accelerator=$ACCELERATOR is none"
  ((SLICES == 1)) || refuse "--slices=$SLICES goes with TPUs only; ask for more --hosts"
  resource=nvidia.com/gpu
  selector="cloud.google.com/gke-accelerator: $ACCELERATOR"
  annotations='{}'
  environment="
              - name: JAX_COORDINATOR_ADDRESS
                value: $NAME-host-0-0.$NAME:8476
              - name: JAX_NUM_PROCESSES
                value: '$HOSTS'
              - name: JAX_PROCESS_ID
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']"
fi

run_with_input kubectl apply ${NAMESPACE:+"--namespace=$NAMESPACE"} -f - <<JOBSET
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations: $annotations
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
  replicatedJobs:
  - name: host
    replicas: $SLICES
    template:
      spec:
        parallelism: $HOSTS
        completions: $HOSTS
        completionMode: Indexed
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            # Time for the step in progress to end and to be saved.
            terminationGracePeriodSeconds: 600
            nodeSelector:
              $selector
            containers:
            - name: agentrl
              image: $IMAGE
              command:
$(yaml_list python3 -m agentrl.main "--config=$CONFIG" "--workdir=$WORKDIR" --distributed=on --stopped_exit_code=75 \
  ${EXTRA[@]+"${EXTRA[@]}"})
              env: $environment
              ports:
              - containerPort: 8476
              - containerPort: 8471
              resources:
                limits:
                  $resource: $CHIPS_PER_HOST
              volumeMounts:
              - name: share
                mountPath: /share
              - name: memory
                mountPath: /dev/shm
            volumes:
            - name: share
              persistentVolumeClaim:
                claimName: $CLAIM
            - name: memory
              emptyDir:
                medium: Memory
JOBSET
