"""The demo confined like a pod: a read-only root, the chart's volumes and environment, uid 1000, no capabilities.

A mount namespace instead of a container: needs root and util-linux. What it cannot show are the image's own files.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.manifests import ROOT, ray_pods, render
from tests.support.lacking import lacking

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_ray")]

# Where the virtual environment and the project stand inside, wherever they are outside: no volume hides them.
PYTHON, SOURCE = "/opt/kat-ray", "/opt/source"

# A new root of read-only mounts: the system, Python and the project; beside them the pod's volumes. The environment
# is mounted entry by entry and the sources are copied: their own folder may be one that only its owner may enter.
SCRIPT = r"""
set -eu
umask 022
new={new}
mount -t tmpfs none "$new"
bind() {{
    if [ -L "$1" ]; then cp -P "$1" "$new$2"; return; fi
    if [ -d "$1" ]; then mkdir -p "$new$2"; else touch "$new$2"; fi
    mount --bind "$1" "$new$2"
    mount -o remount,ro,bind "$new$2"
}}
for path in /bin /etc /lib /lib64 /sbin /usr {base}; do
    if [ -e "$path" ]; then bind "$path" "$path"; fi
done
mkdir -p "$new{python}" "$new{source}"
for path in {prefix}/*; do bind "$path" "{python}/${{path##*/}}"; done
for name in actors kat_ray; do cp -R {root}/$name "$new{source}/"; done
chmod -R a+rX "$new{source}"
for name in proc sys dev; do mkdir "$new/$name"; mount --rbind "/$name" "$new/$name"; done
for path in {volumes}; do mkdir -p "$new$path"; mount -t tmpfs -o mode=1777 none "$new$path"; done
mount -o remount,ro "$new"
exec chroot "$new" setpriv --reuid {uid} --regid {uid} --clear-groups --no-new-privs --bounding-set=-all \
    --inh-caps=-all {command}
"""


def confined(folder, command, volumes):
    """Run a command as the chart's head container would run it."""
    pod = ray_pods(render("smoke"))["head"]["spec"]
    (container,) = pod["containers"]
    environment = {e["name"]: e["value"] for e in container["env"] if "value" in e}
    environment |= {"PATH": f"{PYTHON}/bin:/usr/bin:/bin", "PYTHONPATH": SOURCE}
    environment |= {"LOGNAME": "kat", "PYTHONDONTWRITEBYTECODE": "1"}  # a name for uid 1000; both as in the image
    env = ["env", "-i", *(f"{k}={v}" for k, v in environment.items())]
    script = SCRIPT.format(
        new=shlex.quote(str(folder)),
        base=shlex.quote(sys.base_prefix),
        prefix=shlex.quote(sys.prefix),
        root=shlex.quote(str(ROOT)),
        python=PYTHON,
        source=SOURCE,
        volumes=" ".join(volumes),
        uid=pod["securityContext"]["runAsUser"],
        command=shlex.join([*env, *command]),
    )
    return subprocess.run(
        ["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def volumes():
    """Where the head's writable volumes are mounted."""
    probe = 'd=$(mktemp -d) && mount -t tmpfs none "$d" && setpriv --no-new-privs true'
    if subprocess.run(["unshare", "--mount", "sh", "-c", probe], capture_output=True, check=False).returncode:
        lacking("mounting is refused here: needs root, and a container that may mount")
    (container,) = ray_pods(render("smoke"))["head"]["spec"]["containers"]
    places = [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
    if hidden := [p for p in places if Path(sys.base_prefix).is_relative_to(p)]:
        lacking(f"Python itself ({sys.base_prefix}) lies in {hidden[0]}, which the pod's own {hidden[0]} hides")
    return places


def test_nothing_else_can_be_written(tmp_path, volumes):
    code = (
        "import os\n"
        "print(os.getuid(), [d for d in ('/', '/etc', '/usr', '/var/tmp', '/tmp', '/dev/shm', '/cache', '/runs')"
        " if os.access(d, os.W_OK)])\n"
        "print([l for l in open('/proc/self/status') if l.startswith('CapBnd')][0].split()[1])"
    )
    done = confined(tmp_path, [f"{PYTHON}/bin/python", "-c", code], volumes)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1000 ['/tmp', '/dev/shm', '/cache', '/runs']\n0000000000000000\n"


@pytest.mark.nightly
def test_the_demo_trains(tmp_path, volumes):
    arguments = ["run.dir=/runs", "run.steps=2", "evaluation.teacher=false", "evaluation.data.limit=4"]
    code = (
        "import sys, pathlib; from kat_ray.cli.main import main; code = main(); "
        "print('left:', sorted(p.name for p in pathlib.Path('/runs/demo').iterdir())); sys.exit(code)"
    )
    done = confined(tmp_path, [f"{PYTHON}/bin/python", "-c", code, "train", "demo", *arguments], volumes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "'checkpoints'" in done.stdout and "'summary.json'" in done.stdout
    assert "Read-only file system" not in done.stdout + done.stderr
