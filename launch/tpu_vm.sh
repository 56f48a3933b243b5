#!/usr/bin/env bash
# Runs a config on Cloud TPU VMs, from asking for them to deleting them.
#
#   launch/tpu_vm.sh COMMAND --name=NAME --project=PROJECT --zone=ZONE ...
#
#   launch/tpu_vm.sh resume --name=latents --project=my-project \
#       --zone=us-east5-b --type=v6e-256 --spot --config=configs/gemma2b.py \
#       --workdir=gs://my-bucket/gemma2b \
#       --prepare='gcloud storage cp -r gs://my-bucket/gemma-2-2b ~' \
#       -- --config.decoder.path=../gemma-2-2b
#
# COMMAND
#   create  asks for the TPU (a queued resource) and waits until it is there
#   setup   copies this checkout to every worker and installs it, with `[tpu]`
#   run     starts the trainer on every worker, detached from this shell
#   resume  all of the above, and again after every preemption or failure until
#           the run is finished; keep it running, or call it again at any time
#   status  the TPU's state and each worker's
#   logs    follows one worker's log
#   stop    tells the trainer to save and stop
#   delete  deletes the TPU; asks first
#
#   --type=TYPE         create, resume: v5litepod-256, v5p-256, v6e-256, ...
#   --runtime-version=V the VM's image; default by type
#   --slices=N          N such TPUs as one run, joined over the network (1)
#   --spot, --reserved, --network=, --subnetwork=, --service-account=
#                       go to gcloud as they are
#   --config=FILE       run, resume: a file of this checkout
#   --workdir=DIR       run, resume: gs://BUCKET/..., or a disk all hosts mount
#   --prepare=COMMAND   setup, resume: what else each worker must do once, such
#                       as to fetch the decoder's weights
#   --tries=N           resume: how often to set up and start in all (20)
#   --node=N, --worker=N  logs: of which slice and host (0, 0)
#   --yes               delete: do not ask
#   --dry-run           print every command, run nothing
#
# What follows `--` goes to `python -m cacheaug.main` as it is, after
# --multihost; the trainer starts in the checkout, which is ~/cacheaug there.
# POLL_SECONDS is the pause between looks at the state (30).

# What stands in single quotes is for the workers' shells.
# shellcheck disable=SC2016
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

subcommand "create setup run resume status logs stop delete" "$@"
through=(network subnetwork service-account)
parse "name project zone type runtime-version slices config workdir prepare \
tries node worker ${through[*]}" "spot reserved yes" "${@:2}"
need name project zone
default slices 1
default tries 20
default node 0
default worker 0
whole slices 1
whole tries 1
whole node 0
whole worker 0
poll=${POLL_SECONDS:-30}
name=${given[name]}
where=("--project=${given[project]}" "--zone=${given[zone]}")
tpus=(gcloud compute tpus)
# gcloud appends -0, -1, ... to the prefix when it makes several nodes.
nodes=("$name")
if ((given[slices] > 1)); then
  nodes=()
  for ((i = 0; i < given[slices]; i++)); do nodes+=("$name-$i"); done
fi

# ask ASSUMED COMMAND...: its answer; MISSING where gcloud finds no such thing,
# ASSUMED in a dry run.
ask() {
  local answer status=0
  if has dry-run; then
    quoted "${@:2}" >&3
    echo "$1"
    return
  fi
  { answer=$("${@:2}" 2>&1 >&4) || status=$?; } 4>&1
  if ((status == 0)); then return; fi
  if [[ $answer == *NOT_FOUND* ]]; then
    echo MISSING
    return
  fi
  echo "$answer" >&2
  failed "$status" "${@:2}"
}

# state ASSUMED: the queued resource's state; PREEMPTED where it is ACTIVE
# still but a node of it is not.
state() {
  local queued node alive
  queued=$(ask "$1" "${tpus[@]}" queued-resources describe "$name" \
    "${where[@]}" '--format=value(state.state)') || exit
  if [[ $queued == ACTIVE ]]; then
    for node in "${nodes[@]}"; do
      alive=$(ask READY "${tpus[@]}" tpu-vm describe "$node" "${where[@]}" \
        '--format=value(state)') || exit
      case $alive in PREEMPTED | TERMINATED | MISSING) queued=PREEMPTED ;; esac
    done
  fi
  echo "$queued"
}

# ssh NODE WORKER COMMAND
ssh_to() {
  call "${tpus[@]}" tpu-vm ssh "$1" "${where[@]}" "--worker=$2" "--command=$3"
}

on_all() {
  local node
  for node in "${nodes[@]}"; do ssh_to "$node" all "$1"; done
}

runtime_version() {
  case ${given[type]} in
    v6e-*) default runtime-version v2-alpha-tpuv6e ;;
    v5p-*) default runtime-version v2-alpha-tpuv5 ;;
    v5litepod-*) default runtime-version v2-alpha-tpuv5-lite ;;
    v4-*) default runtime-version tpu-ubuntu2204-base ;;
  esac
  need runtime-version
}

create() {
  local option options=("${where[@]}" "--accelerator-type=${given[type]}"
    "--runtime-version=${given[runtime-version]}")
  if ((given[slices] > 1)); then
    options+=("--node-count=${given[slices]}" "--node-prefix=$name")
  else
    options+=("--node-id=$name")
  fi
  for option in spot reserved; do
    if has "$option"; then options+=("--$option"); fi
  done
  for option in "${through[@]}"; do
    if has "$option"; then options+=("--$option=${given[$option]}"); fi
  done
  call "${tpus[@]}" queued-resources create "$name" "${options[@]}"
  wait_until_active
}

wait_until_active() {
  local now last=
  while now=$(state ACTIVE) || exit; [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDED | PREEMPTED | MISSING)
        die "$name is $now: delete it and create it again"
        ;;
    esac
    if [[ $now != "$last" ]]; then note "$name is $now, waiting"; fi
    last=$now
    sleep "$poll"
  done
}

# The images come with Python 3.10; uv fetches the one that is tested.
setup() {
  local node
  for node in "${nodes[@]}"; do
    ssh_to "$node" all 'rm -rf ~/cacheaug && mkdir ~/cacheaug'
    call "${tpus[@]}" tpu-vm scp "$root/setup.py" "$root/cacheaug" \
      "$root/configs" "$root/launch" "$node:cacheaug/" "${where[@]}" \
      --worker=all --recurse
    ssh_to "$node" all "cd ~/cacheaug && \
python3 -m pip install --quiet --user uv && \
python3 -m uv venv --quiet --allow-existing --python=3.11 ~/cacheaug_venv && \
python3 -m uv pip install --quiet --python ~/cacheaug_venv/bin/python \
-e '.[tpu]'"
    if has prepare; then ssh_to "$node" all "${given[prepare]}"; fi
  done
}

run() {
  local start
  worker_command launch/local.sh --status-file=../cacheaug_run/status
  start='set -e; mkdir -p ~/cacheaug_run; cd ~/cacheaug;'
  start+=' if kill -0 "$(cat ~/cacheaug_run/pid 2>/dev/null)" 2>/dev/null;'
  start+=' then echo "error: $(hostname) is running already" >&2; exit 1; fi;'
  start+=' rm -f ~/cacheaug_run/status;'
  start+=' PATH=~/cacheaug_venv/bin:$PATH nohup setsid'
  start+=" $(quoted "${worker[@]}")"
  start+=' >>~/cacheaug_run/log 2>&1 </dev/null & echo $! >~/cacheaug_run/pid'
  on_all "$start"
}

# What `run` left on a worker: "run: running", "run: lost" or the exit status.
look='cd ~/cacheaug_run 2>/dev/null; if [ -s status ]; then'
look+=' echo "run: $(cat status)"; elif kill -0 "$(cat pid 2>/dev/null)"'
look+=' 2>/dev/null; then echo "run: running"; else echo "run: lost"; fi'

# outcome: running while any worker is, else finished (all ended with 0) or
# failed.
outcome() {
  local node answer all=
  for node in "${nodes[@]}"; do
    answer=$(ask "run: 0" "${tpus[@]}" tpu-vm ssh "$node" "${where[@]}" \
      --worker=all "--command=$look") || exit
    all+="$answer"$'\n'
  done
  if grep -q '^run: running' <<<"$all"; then
    echo running
  elif grep -q '^run: 0' <<<"$all" && ! grep '^run: ' <<<"$all" |
    grep -qvx 'run: 0'; then
    echo finished
  else
    echo failed
  fi
}

delete() {
  call "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force \
    --quiet
}

# How `advance` ends, besides 1 for what failed.
readonly FINISHED=0 WAITING=3 STARTED=4 SPENT=5

# advance STARTS ASSUMED: one look at the state, and what it asks for; starts
# the run only where fewer than --tries were made.
advance() {
  local now result
  now=$(state "$2") || exit
  case $now in
    ACTIVE)
      result=$(outcome) || exit
      case $result in
        finished) exit "$FINISHED" ;;
        running) exit "$WAITING" ;;
      esac
      note "$name is there, the run is not going"
      ;;
    SUSPENDED | FAILED | PREEMPTED) note "$name is $now" ;;
    MISSING) note "there is no $name" ;;
    *)
      note "$name is $now, waiting"
      exit "$WAITING"
      ;;
  esac
  if (($1 >= given[tries])); then exit "$SPENT"; fi
  case $now in SUSPENDED | FAILED | PREEMPTED) delete ;; esac
  if [[ $now != ACTIVE ]]; then create; fi
  setup
  run
  exit "$STARTED"
}

resume() {
  local tried=0 pause=$poll status assumed=SUSPENDED
  while :; do
    status=0
    (advance "$tried" "$assumed") || status=$?
    case $status in
      "$FINISHED")
        note "$name: the run is finished"
        return
        ;;
      "$WAITING") pause=$poll ;;
      *) tried=$((tried + 1)) ;;
    esac
    if ((status == SPENT || tried > given[tries])); then
      die "gave up on $name after ${given[tries]} tries: see its logs"
    fi
    assumed=ACTIVE
    if has dry-run; then continue; fi
    sleep "$pause"
    if ((status != WAITING)); then
      pause=$((pause < 900 ? pause * 2 : 1800))
    fi
  done
}

case $command in
  create | resume)
    need type
    runtime_version
    ;;&
  run | resume)
    need config workdir
    config_in "$root"
    lasting_workdir
    ;;&
  create | setup | run | resume) "$command" ;;
  status)
    now=$(state ACTIVE)
    has dry-run || echo "$name: $now"
    if [[ $now == ACTIVE ]]; then on_all 'echo "$(hostname)"; '"$look"; fi
    ;;
  logs)
    ((given[node] < ${#nodes[@]})) ||
      misuse "--node=${given[node]} must be less than --slices"
    ssh_to "${nodes[${given[node]}]}" "${given[worker]}" \
      'tail -n 200 -F ~/cacheaug_run/log'
    ;;
  stop) on_all 'kill -TERM "$(cat ~/cacheaug_run/pid)"' ;;
  delete)
    confirm "Delete $name in ${given[zone]} of ${given[project]}?"
    delete
    ;;
esac
