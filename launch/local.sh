#!/usr/bin/env bash
# Trains on this host and restarts what fails, up to a number of tries.
#
#   launch/local.sh --config=FILE --workdir=DIR [--tries=5] [-- FLAGS...]
#
#   launch/local.sh --config=configs/gemma2b.py --workdir=runs/gemma2b \
#       -- --config.decoder.path=/models/gemma-2-2b
#
# FLAGS go to `python -m cacheaug.main` as they are. A run with the same
# --workdir resumes there by itself.
#
#   --tries=N           starts in all; the pause between them doubles
#   --status-file=FILE  where to write the exit status at the end
#   --dry-run           print the command, run nothing
#
# SIGTERM and ctrl-C go on to the trainer, which saves a checkpoint and exits
# 0. This script then exits 143, so that whoever started it can tell:
#   0    the run is finished
#   143  stopped by SIGTERM, a checkpoint is saved: run it again to go on
#   else the last failure's status
# POLL_SECONDS is the first pause (10).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "config workdir tries status-file" "" "$@"
need config workdir
default tries 5
whole tries 1
config_in "$PWD"

trainer=(python -m cacheaug.main "--config=${given[config]}"
  "--workdir=${given[workdir]}" "${extra[@]}")
if has dry-run; then
  call "${trainer[@]}"
  exit 0
fi

# shellcheck disable=SC2329 # The traps call it.
leave() {
  local status=$?
  if has status-file; then echo "$status" >"${given[status-file]}"; fi
}
signals=0 child=
# shellcheck disable=SC2329
stop() {
  signals=$((signals + 1))
  if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap leave EXIT
trap stop TERM INT

# attend COMMAND...: runs it and sets `status`; a signal goes on to it.
attend() {
  local before=-1
  "$@" &
  child=$!
  # One that came before there was a child to pass it on to.
  if ((signals)); then kill -TERM "$child" 2>/dev/null || true; fi
  # A signal cuts `wait` short: then again.
  while ((before != signals)); do
    before=$signals status=0
    wait "$child" || status=$?
  done
  child=
}

pause=${POLL_SECONDS:-10}
for ((try = 1; try <= given[tries]; try++)); do
  echo "+ $(quoted "${trainer[@]}")" >&2
  attend "${trainer[@]}"
  if ((signals)); then
    echo "stopped by a signal, the trainer ended with status $status" >&2
    exit $((status == 0 ? 143 : status))
  fi
  ((status != 0)) || exit 0
  last=$status
  echo "try $try of ${given[tries]} ended with status $last" >&2
  ((try < given[tries])) || break
  attend sleep "$pause"
  ((signals == 0)) || exit 143
  pause=$((pause < 300 ? pause * 2 : 600))
done
exit "$last"
