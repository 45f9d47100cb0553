#!/usr/bin/env bash
# Makes .venv and installs newel into it, showing each step and its seconds: deploy/setup.sh demo|dev.
#
# PYTHON names the interpreter; otherwise the python3 of the PATH is used if it will do, else the newest that will.
# PyTorch comes first, so that a machine without an NVIDIA GPU gets the CPU build and not gigabytes of CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  demo) extras=train ;;
  dev) extras=train,postgres,redis,otel,dev ;;
  *) echo "usage: deploy/setup.sh demo|dev" >&2; exit 2 ;;
esac
log=.venv/setup.log
torch=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)

usable() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if usable "$candidate"; then echo "$candidate"; return; fi
  done
  cat >&2 <<EOF
newel needs Python 3.11, 3.12 or 3.13 with its venv module, and found none in: ${PYTHON:-python3 python3.13 python3.12 python3.11}
  Debian, Ubuntu:  apt install python3 python3-venv
  macOS:           brew install python@3.13
  elsewhere:       name one, for example  make demo PYTHON=/opt/python3.13/bin/python3
EOF
  return 1
}

# Runs a command quietly, with the time that it takes; when it fails, the end of its output is shown and setup stops.
step() {
  local title=$1 begun=$SECONDS status=0 ticker=
  shift
  printf '%-62s' "$title"
  if [ -t 1 ]; then
    while sleep 1; do printf '\r%-62s%4d s' "$title" $((SECONDS - begun)); done &
    ticker=$!
  fi
  "$@" >>"$log" 2>&1 || status=$?
  [ -z "$ticker" ] || { kill "$ticker" && wait "$ticker" 2>/dev/null || printf '\r%-62s' "$title"; }
  if [ "$status" -ne 0 ]; then
    printf ' failed after %d s. The end of %s:\n' $((SECONDS - begun)) "$log"
    tail -n 25 "$log" | sed 's/^/  | /'
    exit 1
  fi
  printf '%4d s\n' $((SECONDS - begun))
}

pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }

has_torch() { .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$torch')"; }

install_torch() {
  if [ "$(uname -s)" = Darwin ] || nvidia-smi >/dev/null 2>&1; then
    pip install "torch==$torch"
    return
  fi
  pip install "torch==$torch+cpu" && return
  pip install "torch==$torch+cpu" --index-url https://download.pytorch.org/whl/cpu && return
  echo "No CPU build of PyTorch $torch can be reached, so the ordinary one is installed (it carries CUDA: about 3 GB)."
  pip install "torch==$torch"
}

if ! .venv/bin/python -c '' 2>/dev/null; then
  python=$(find_python)
  mkdir -p .venv
  step "Python: $("$python" -V), $("$python" -c 'import sys; print(sys.executable)')" "$python" -m venv --clear .venv
fi
has_torch 2>/dev/null || step "PyTorch $torch" install_torch
step "newel with $extras, and its libraries (log: $log)" pip install --constraint constraints.txt --editable ".[$extras]"
step "The encoder of the guard's classifiers" .venv/bin/newel guard pull
touch .venv/.demo
[ "$1" = demo ] || touch .venv/.dev
