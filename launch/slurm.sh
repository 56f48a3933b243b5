#!/usr/bin/env bash
# Submits a run to Slurm: one task a node, which takes all of its GPUs.
#
#   launch/slurm.sh --name=NAME --nodes=N --gpus=G --config=FILE \
#       --workdir=DIR [options] [-- FLAGS...]
#
#   launch/slurm.sh --name=gemma2b --nodes=2 --gpus=8 --time=24:00:00 \
#       --config=configs/gemma2b.py --workdir=/shared/runs/gemma2b \
#       -- --config.decoder.path=/shared/models/gemma-2-2b
#
# Run it from the repository, on a disk that the nodes share, with the Python
# environment active. FLAGS go to `python -m cacheaug.main` as they are.
#
#   --gpus=G       GPUs of each node
#   --partition, --account, --qos, --time, --cpus-per-task, --mem
#                  go to sbatch as they are
#   --output=FILE  the log; default slurm-NAME-%j.log
#   --grace=S      seconds before the time limit at which to save (120)
#   --dry-run      print the command and the job's script, submit nothing
#
# When the time limit or a preemption comes, the trainer saves and the job puts
# itself back into the queue; it resumes from --workdir. Any other failure ends
# the job. Afterwards: squeue --me; tail -f LOG; scancel JOB.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

passed=(partition account qos time cpus-per-task mem)
parse "name nodes gpus config workdir output grace ${passed[*]}" "" "$@"
need name nodes gpus config workdir
default output "slurm-${given[name]}-%j.log"
default grace 120
whole nodes 1
whole gpus 1
whole grace 1
config_in "$PWD"

options=("--job-name=${given[name]}" "--nodes=${given[nodes]}"
  --ntasks-per-node=1 "--gpus-per-node=${given[gpus]}"
  "--signal=B:TERM@${given[grace]}" --requeue --open-mode=append
  "--output=${given[output]}")
for name in "${passed[@]}"; do
  if has "$name"; then options+=("--$name=${given[$name]}"); fi
done

worker_command "$root/launch/local.sh"
# srun treats SIGTERM as an order to kill its step at once, so the batch shell
# signals the step itself. A task that was told to stop exits 143; one task's
# exit must not end the others, which are still saving.
script="#!/usr/bin/env bash
signals=0 before=-1
trap 'signals=\$((signals + 1)); scancel --signal=TERM \"\$SLURM_JOB_ID\"' TERM
srun --kill-on-bad-exit=0 $(quoted "${worker[@]}") &
while ((before != signals)); do
  before=\$signals status=0
  wait \$! || status=\$?
done
if ((status == 143)); then
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \"\$status\""
feed "$script" sbatch "${options[@]}"
