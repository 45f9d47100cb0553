#!/bin/sh
# Trains on this machine in several processes: deploy/train/local.sh METHOD RECIPE [KEY=VALUE]...
#
# PROCESSES (2) is how many, on GPUs one each. RESTARTS (0) is how often all of them are started again when one has
# died; they go on from the last checkpoint.
set -eu

[ $# -ge 2 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(dirname "$0")
PATH="$(cd "$here/../.." && pwd)/.venv/bin:$PATH" # what `make` has set up, if it has
processes=${PROCESSES:-2}
cores=$(($(nproc) / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 1 ? cores : 1))}" # threads that wait for each other cost most
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a restart would read the addresses of processes that have died
exec torchrun --standalone --nproc-per-node "$processes" --max-restarts "${RESTARTS:-0}" --no-python newel train "$@"
