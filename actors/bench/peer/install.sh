#!/usr/bin/env bash
# The peer's environment: actors/bench/peer/install.sh [VENV], default .venv-peer beside the project's own .venv.
# A second call that finds nothing changed installs nothing. Nothing in it enters the project's dependencies.
#
# TRL, on the versions that docker/requirements-cpu.lock gives to what both have (torch, transformers, vLLM, ...), so
# that the comparison is one of the two programs. As there, torch comes first, and the rest without what vLLM's wheel
# asks for beside it (docker/install.sh says why). Left out: ray and deepspeed, which the peer does not run on here.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
venv=${1:-$root/.venv-peer}
python=${PYTHON:-python3}
lock=$root/docker/requirements-cpu.lock
own=(trl==1.16.0 accelerate==1.15.0)

wanted=$(cat "$lock" "${BASH_SOURCE[0]}" | sha256sum | cut -d' ' -f1)
stamp=$venv/.kat-ray-stamp
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
        echo "actors/bench/peer/install.sh: '$*' failed" >&2
        exit 1
    fi
}

echo "setting up the peer in $venv (once; about 3 minutes and 3 GB)"
[ -x "$venv/bin/python" ] || step "virtual environment" "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input)
shared=$venv/requirements-shared.txt
grep -vE '^(ray|deepspeed)==' "$lock" >"$shared"
step "torch" "${pip[@]}" torch==2.13.0
step "shared packages" "${pip[@]}" --no-deps -r "$shared"
step "the peer" "${pip[@]}" --no-deps "${own[@]}"
step "check" "$venv/bin/python" -c "import vllm; from trl import DistillationTrainer"
echo "$wanted" >"$stamp"
