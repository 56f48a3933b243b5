#!/usr/bin/env bash
# Every open figure of this package on one GPU, in at most nine minutes.
#
#   benchmarks/on_gpu.sh OUT [--dry-run] [--wheels=DIR] [PART ...]
#
# Run from the repository's root, with the package's requirements installed, or
# --wheels=DIR of what is missing (benchmarks/on_gpu_wheels.sh gathers them).
# Parts, in order, each with its own time limit; what is measured is written as
# it comes, a part that is run again goes on where it was stopped:
#   kernels        errors against float64, useful TFLOP/s       45 s
#   mosaic         the same of the Mosaic kernels               25 s
#   step           Gemma-2 2B and Gemma-3 270M, and peers       130 s
#   deterministic  the same step twice, with and without        35 s
#   flex           the step in PyTorch with FlexAttention       65 s
#   cross_entropy  V = 256,128 and 262,144 against float64      25 s
#   decode         tokens a second, beside the memory's         35 s
#   run            configs/sweeps/gpu.py, cut to its time       180 s
# Ends with OUT/RESULTS-gpu.md. --dry-run runs every line at small shapes on a CPU,
# two parts at a time.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

usage() { sed -n '4s/^# *//p' benchmarks/on_gpu.sh >&2; exit 2; }
python=${PYTHON:-python3}
all=(kernels mosaic step deterministic flex cross_entropy decode run)
out='' wheels='' tiny=() parts=() dry=0 slower=1
for argument in "$@"; do
  case $argument in
    --dry-run) dry=1 slower=20 tiny=(--tiny) ;;
    --wheels=*) wheels=${argument#*=} ;;
    -*) usage ;;
    *) if [[ -z $out ]]; then out=$argument; else parts+=("$argument"); fi ;;
  esac
done
[[ -n $out ]] || usage
[[ ${#parts[@]} -gt 0 ]] || parts=("${all[@]}")
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if ((dry)); then
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS=${XLA_FLAGS:---xla_backend_optimization_level=0}
fi
if [[ -n $wheels && ! -d $out/site ]]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile \
    --target "$out/site" "$wheels"/*.whl || exit 1
fi
[[ ! -d $out/site ]] || export PYTHONPATH="$out/site:$PYTHONPATH"

# within SECONDS NAME COMMAND...: its output in NAME.log, its end in status.txt.
within() {
  local seconds=$1 name=$2 began=$SECONDS status
  shift 2
  echo "== $name (at most $((slower * seconds)) s)"
  timeout --kill-after=5 "$((slower * seconds))" "$@" >>"$out/$name.log" 2>&1
  status=$?
  echo "$name $status $((SECONDS - began))" >>"$out/status.txt"
  ((status == 0)) || echo "   ended with $status: $(tail -1 "$out/$name.log")"
}

# The last seconds of a limit are left to end in.
measure() {
  within "$1" "$2" "$python" benchmarks/on_gpu.py "$2" --out="$out" \
    --seconds="$((slower * $1 - 8))" "${tiny[@]}"
}

# A decoder for a minute, then two rows of the sweep with what is left.
train() {
  local decoder=(--config.optimizer.steps=400 --config.eval.sequences=64)
  local rows=(--config.optimizer.steps=150 --only='^(N32|pause)-seed0')
  if ((dry)); then
    local text=(--config.data.sources.code.kind=text
      --config.data.validation_fraction=0.3
      --config.data.sources.code.path="$PWD/benchmarks/*.py"
      --config.data.sequence=32 --config.data.batch=8 --config.eval.batch=8
      --config.eval.sequences=8 --config.optimizer.steps=2
      --config.optimizer.warmup=0 --config.decoder.shape.width=16
      --config.decoder.shape.layers=1 --config.decoder.shape.heads=2
      --config.decoder.shape.kv_heads=1 --config.decoder.shape.head_dim=8
      --config.decoder.shape.mlp_width=16)
    decoder=("${text[@]}")
    rows=("${text[@]}" --only='^N4-seed0' --config.traces.count=2
      --config.traces.ahead=2 --config.eval.context=8
      --config.eval.ahead=4)
  fi
  if [[ ! -d $out/decoder/export ]]; then
    within 60 run "$python" -m cacheaug.main --config=configs/gpu_decoder.py \
      --workdir="$out/decoder" --config.export="$out/decoder/export" \
      "${decoder[@]}"
  fi
  within 120 run "$python" -m cacheaug.sweep --config=configs/sweeps/gpu.py \
    --workdir="$out/sweep" --config.decoder.path="$out/decoder/export" \
    --config.log_every=25 "${rows[@]}"
}

run_part() {
  case $1 in
    kernels) measure 45 kernels ;;
    mosaic) measure 25 mosaic ;;
    step) measure 130 step ;;
    deterministic) measure 35 deterministic ;;
    # JAX only checks the loss there: PyTorch has the GPU to itself.
    flex) JAX_PLATFORMS=cpu measure 65 flex ;;
    cross_entropy) measure 25 cross_entropy ;;
    decode) measure 35 decode ;;
    run) train ;;
  esac
}

for part in "${parts[@]}"; do
  [[ " ${all[*]} " == *" $part "* ]] || {
    echo "no part $part; there are: ${all[*]}" >&2
    exit 2
  }
done
for part in "${parts[@]}"; do
  if ((dry)); then # nothing is timed: two at a time
    (($(jobs -rp | wc -l) < 2)) || wait -n
    run_part "$part" &
  else
    run_part "$part"
  fi
done
wait
"$python" benchmarks/on_gpu_report.py "$out"
