#!/usr/bin/env bash
# Runs a config on GKE's TPU slices as a JobSet.
#
#   launch/gke.sh COMMAND --name=NAME [options] [-- FLAGS...]
#
#   launch/gke.sh run --name=latents --image=IMAGE \
#       --accelerator=tpu-v6e-slice --topology=16x16 \
#       --config=configs/gemma2b.py --workdir=gs://my-bucket/gemma2b \
#       -- --config.decoder.path=/models/gemma-2-2b
#
# The cluster is kubectl's current context (or --context) and needs JobSet 0.6
# or newer and a node pool of that accelerator and topology for each slice. The
# image is launch/Dockerfile's, with what the config reads added to it (here
# /models). FLAGS go to `python -m cacheaug.main` as they are, after
# --multihost.
#
# COMMAND
#   render  prints the manifest
#   run     applies it; delete a finished one of the same name first
#   status  the JobSet and its pods
#   logs    follows one host's log
#   delete  deletes it; asks first
#
#   --accelerator=A      tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology=T         chips of one slice: 16x16, 4x4x8, ...
#   --slices=N           that many slices as one run (1)
#   --chips-per-host=N   of the node pool's machine type (4, or all if fewer)
#   --config=FILE        a file of this checkout, which the image holds
#   --workdir=DIR        gs://BUCKET/..., or a disk all hosts mount
#   --max-restarts=N     after failures (10); preemptions do not count
#   --grace=S            seconds to save in after SIGTERM (300); a spot node
#                        may be gone sooner
#   --spot               on spot nodes
#   --service-account=S  Kubernetes service account that may write the bucket
#   --namespace=S, --context=S  as for kubectl
#   --slice=N, --host=N  logs: of which (0, 0)
#   --yes                delete: do not ask
#   --dry-run            print every command, run nothing
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

subcommand "render run status logs delete" "$@"
parse "name image accelerator topology slices chips-per-host config workdir \
max-restarts grace service-account namespace context slice host" "spot yes" \
  "${@:2}"
need name
[[ ${given[name]} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  misuse "--name=${given[name]} must be lower-case letters, digits and" \
    "dashes, 40 at most, and start with a letter"
default slice 0
default host 0
whole slice 0
whole host 0

name=${given[name]}
kubectl=(kubectl)
for option in context namespace; do
  if has "$option"; then kubectl+=("--$option=${given[$option]}"); fi
done
set_label=jobset.sigs.k8s.io/jobset-name=$name

# A word as a JSON string, which is YAML as well.
json() {
  local word=$1
  word=${word//\\/\\\\}
  word=${word//\"/\\\"}
  printf '"%s"' "$word"
}

# Kubernetes expands $(NAME) in arguments; $$ is its plain dollar sign.
arguments() {
  local word list=
  for word; do list+=", $(json "${word//\$/\$\$}")"; done
  printf '[%s]' "${list:2}"
}

count_hosts() {
  local side
  chips=1
  [[ ${given[topology]} =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] ||
    misuse "--topology=${given[topology]} must be like 16x16 or 4x4x8"
  for side in ${given[topology]//x/ }; do chips=$((chips * side)); done
  default chips-per-host "$((chips < 4 ? chips : 4))"
  whole chips-per-host 1
  ((chips % given[chips-per-host] == 0)) ||
    misuse "--topology=${given[topology]} has $chips chips, not a multiple of" \
      "--chips-per-host=${given[chips-per-host]}"
  hosts=$((chips / given[chips-per-host]))
}

# Exit status 143 is launch/local.sh's word for "stopped by SIGTERM, saved", and
# DisruptionTarget a node taken away: either makes the whole set again.
manifest() {
  local accelerator
  accelerator=$(json "${given[accelerator]}")
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    # One slice to one node pool.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${given[max-restarts]}
    rules:
      - action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: ${given[slices]}
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          # One host's end is the end of the run on all of them.
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
              - action: FailJob
                onExitCodes: {operator: In, values: [143]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: ${given[grace]}
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
$(if has service-account; then
    echo "              serviceAccountName: $(json "${given[service-account]}")"
  fi)
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: "${given[topology]}"
$(if has spot; then
    echo '                cloud.google.com/gke-spot: "true"'
    echo '              tolerations:'
    echo '                - key: cloud.google.com/gke-spot'
    echo '                  operator: Exists'
  fi)
              containers:
                - name: trainer
                  image: $(json "${given[image]}")
                  command: $(arguments "${worker[@]}")
                  ports:
                    - containerPort: 8471 # TPU runtime
                    - containerPort: 8482 # jax.distributed
                    - containerPort: 8080 # between slices
                  resources:
                    limits:
                      google.com/tpu: ${given[chips-per-host]}
YAML
}

render() {
  need image accelerator topology config workdir
  default slices 1
  default max-restarts 10
  default grace 300
  whole slices 1
  whole max-restarts 0
  whole grace 1
  config_in "$root"
  lasting_workdir
  count_hosts
  worker_command launch/local.sh
  for word in "${given[@]}" "${worker[@]}"; do
    [[ $word != *[[:cntrl:]]* ]] ||
      misuse "$(quoted "$word") has line breaks or other control characters"
  done
  rendered=$(manifest | sed '/^$/d')
}

case $command in
  render)
    render
    printf '%s\n' "$rendered"
    ;;
  run)
    render
    feed "$rendered" "${kubectl[@]}" apply --filename=-
    ;;
  status)
    call "${kubectl[@]}" get jobset "$name"
    call "${kubectl[@]}" get pods "--selector=$set_label" --output=wide
    ;;
  logs)
    selector=$set_label,jobset.sigs.k8s.io/job-index=${given[slice]}
    selector+=,batch.kubernetes.io/job-completion-index=${given[host]}
    call "${kubectl[@]}" logs "--selector=$selector" --tail=200 --follow
    ;;
  delete)
    confirm "Delete the JobSet $name?"
    call "${kubectl[@]}" delete jobset "$name"
    ;;
esac
