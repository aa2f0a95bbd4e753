"""The demo confined like a pod: a read-only root, the chart's volumes and environment, uid 1000, no capabilities.

A mount namespace instead of a container: needs root and util-linux. What it cannot show are the image's own files.
"""

import os
import shlex
import subprocess
import sys

import pytest

from tests.deploy.manifests import ROOT, ray_pods, render

pytestmark = pytest.mark.slow

# A new root of read-only mounts: the system, Python and the project; beside them the pod's volumes.
SCRIPT = r"""
set -eu
umask 022
new={new}
mount -t tmpfs none "$new"
for path in /bin /etc /lib /lib64 /sbin /usr {bound}; do
    if [ -L "$path" ]; then cp -P "$path" "$new/"; continue; fi
    [ -d "$path" ] || continue
    mkdir -p "$new$path"
    mount --bind "$path" "$new$path"
    mount -o remount,ro,bind "$new$path"
done
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
    environment |= {"PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    environment |= {"LOGNAME": "kat", "PYTHONDONTWRITEBYTECODE": "1"}  # a name for uid 1000; both as in the image
    env = ["env", "-i", *(f"{k}={v}" for k, v in environment.items())]
    script = SCRIPT.format(
        new=shlex.quote(str(folder)),
        bound=shlex.join(sorted({str(ROOT), sys.prefix, sys.base_prefix})),
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
        pytest.skip("mounting is refused here: needs root, and a container that may mount")
    if str(ROOT).startswith("/tmp/") or sys.prefix.startswith("/tmp/"):
        pytest.skip("the project lies in /tmp, which the pod's own /tmp hides")
    (container,) = ray_pods(render("smoke"))["head"]["spec"]["containers"]
    return [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]


def test_nothing_else_can_be_written(tmp_path, volumes):
    code = (
        "import os\n"
        "print(os.getuid(), [d for d in ('/', '/etc', '/usr', '/var/tmp', '/tmp', '/dev/shm', '/cache', '/runs')"
        " if os.access(d, os.W_OK)])\n"
        "print([l for l in open('/proc/self/status') if l.startswith('CapBnd')][0].split()[1])"
    )
    done = confined(tmp_path, [sys.executable, "-c", code], volumes)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1000 ['/tmp', '/dev/shm', '/cache', '/runs']\n0000000000000000\n"


def test_the_demo_trains(tmp_path, volumes):
    arguments = ["run.dir=/runs", "run.steps=2", "evaluation.teacher=false", "evaluation.data.limit=4"]
    code = (
        "import sys, pathlib; from kat_ray.cli import main; code = main(); "
        "print('left:', sorted(p.name for p in pathlib.Path('/runs/demo').iterdir())); sys.exit(code)"
    )
    done = confined(tmp_path, [sys.executable, "-c", code, "train", "demo", *arguments], volumes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "'checkpoints'" in done.stdout and "'summary.json'" in done.stdout
    assert "Read-only file system" not in done.stdout + done.stderr
