"""Runs in a bucket of a real S3 server on loopback: killed, their node lost, the store away, and gone.

moto's server, s3fs and what they need are in no lock of the runtime: `make test-buckets` installs them beside it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from safetensors.numpy import load_file

from kat_ray.config.load import config_yaml
from tests.cluster.disturb import steps_done
from tests.support.bucket_server import SECRET, bucket_server, missing
from tests.support.paths import ROOT
from tests.support.runs import config_of, everything

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("own_ray")]
STUBS, REAL = "tests.cluster.stub_train", "kat_ray.cli"


@pytest.fixture(scope="module")
def server():
    if lacking := missing():
        if os.environ.get("KAT_RAY_REQUIRE_BUCKETS"):
            pytest.fail(f"{', '.join(lacking)}: make test-buckets installs them")
        pytest.skip(f"needs {', '.join(lacking)}: make test-buckets")
    with bucket_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        store().mkdir("runs-of-tests")
        yield server


def store():
    import fsspec

    return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)


def command(server, module, *arguments, **more):
    env = (
        os.environ
        | server.environment
        | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    )
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)], env=env | more, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process, code=0, timeout=600):
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, out[-5000:]
    assert SECRET not in out and "Traceback" not in out
    return out


def write(files, tmp_path, name, run_dir, steps, every, **sections):
    run = {
        "name": name, "dir": run_dir, "local_dir": str(tmp_path / "node"), "steps": steps,
        "checkpoint_every": every, "deterministic": True, "keep_checkpoints": 10, "tensorboard": False,
    }  # fmt: skip
    config = config_of(
        files, tmp_path, run=run,
        **{"rollout": {"top_k_logprobs": 16}, "evaluation": {"every": 2 * every}, "sampler": {"replicas": 1},
           "scorer": {"replicas": 1}, "learner": {"world_size": 1}, **sections},
    )  # fmt: skip
    path = tmp_path / f"{name}.yaml"
    path.write_text(config_yaml(config))
    return path


def steps_of(tmp_path, name):
    """Steps that a run has done, by its records on the driver's node."""
    return max(
        (steps_done(file) for file in (tmp_path / "node" / "run").glob(f"*/{name}/metrics.jsonl")), default=0
    )


def wait_for(tmp_path, name, step, process, timeout=600):
    deadline = time.monotonic() + timeout
    while steps_of(tmp_path, name) < step:
        assert process.poll() is None, f"the run ended early: {process.communicate()[0][-3000:]}"
        assert time.monotonic() < deadline, f"step {step} was not reached in {timeout} s"
        time.sleep(0.05)


def downloaded(url, tmp_path):
    """The whole run, as any tool would copy it."""
    to = tmp_path / "downloaded"
    store().get(url.removeprefix("s3://") + "/", f"{to}/", recursive=True)
    return to


@pytest.mark.parametrize("module", [pytest.param(STUBS, id="stubs"), pytest.param(REAL, id="real")])
def test_killed_its_node_lost_and_resumed_it_is_the_local_run_to_the_bit(files, tmp_path, server, module):
    steps, every = (12, 4) if module == STUBS else (6, 2)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "seen").touch()
    finish(
        command(server, module, "train", write(files, tmp_path, "straight", str(tmp_path / "here"), steps, every))
    )
    url = f"s3://runs-of-tests/{module.rpartition('.')[2]}"
    process = command(server, module, "train", write(files, tmp_path, "killed", url, steps, every))
    wait_for(tmp_path, "killed", every + 1, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    shutil.rmtree(tmp_path / "node")
    out = finish(command(server, module, "train", "--resume", f"{url}/latest"))
    assert re.search(rf"resuming {url}/killed after step [1-9]", out)
    assert not list((tmp_path / "node").rglob("*.safetensors")) and not list((tmp_path / "node").rglob("*.jsonl"))
    again, straight = everything(downloaded(f"{url}/killed", tmp_path)), everything(tmp_path / "here" / "straight")
    for part in ("metrics", "evaluations", "traces", "summary", "state", "weights"):
        assert again[part] == straight[part], part
    assert f"all {steps} steps are done" in finish(command(server, module, "train", "--resume", f"{url}/killed"))


def test_a_driver_that_is_killed_at_any_moment_and_its_node_lost(tmp_path, server):
    """Without a cluster, so that there can be many: a driver and the files of two ranks."""

    def process(folder, steps, *resume):
        address = "s3://runs-of-tests/drivers/one"
        return command(server, "tests.support.stored_runs", address, tmp_path / folder, steps, *resume)

    def objects():
        found = store().find("runs-of-tests/drivers/one")
        return {k: store().cat_file(k) for k in found if "/.claims/" not in k and not k.endswith("run.log")}

    finish(process("straight", 6))
    straight = objects()
    for number, seconds in enumerate((0.4, 1.4)):
        store().rm("runs-of-tests/drivers", recursive=True)
        killed = process(f"killed-{number}", 6)
        while not store().exists("runs-of-tests/drivers/one/config.yaml"):
            assert killed.poll() is None
        time.sleep(seconds)
        killed.kill()
        killed.communicate()
        for folder in tmp_path.glob("killed-*"):
            shutil.rmtree(folder)
        finish(process(f"again-{number}", 6, "resume"))
        assert objects() == straight
    store().rm("runs-of-tests/drivers", recursive=True)
    long = process("paused", 60)
    while not store().exists("runs-of-tests/drivers/one/checkpoints/step-2/manifest.json"):
        assert long.poll() is None
    server.pause()
    time.sleep(10)
    server.go_on()
    finish(long)
    assert json.loads(objects()["runs-of-tests/drivers/one/summary.json"]) == {"steps": 60}


def test_two_ranks_each_upload_their_own_and_any_number_restores_it(files, tmp_path, server):
    """Real engines and DeepSpeed; then one rank goes on from what two have written."""
    url = "s3://runs-of-tests/ranks"
    sections = {"learner": {"world_size": 2}, "evaluation": {"data": None}}
    finish(command(server, REAL, "train", write(files, tmp_path, "two", url, 2, 1, **sections)))
    names = {key.rpartition("step-2/")[2] for key in store().find("runs-of-tests/ranks/two/checkpoints/step-2")}
    assert {f"training/learner-{rank}-of-2.safetensors" for rank in (0, 1)} < names
    before = load_file(downloaded(f"{url}/two", tmp_path) / "checkpoints/step-2/model.safetensors")
    more = ["run.steps=3", "learner.world_size=1"]
    out = finish(command(server, REAL, "train", "--resume", f"{url}/two", *more))
    assert "after step 2" in out
    shutil.rmtree(tmp_path / "downloaded")
    after = load_file(downloaded(f"{url}/two", tmp_path) / "checkpoints/step-3/model.safetensors")
    assert before.keys() == after.keys()


def test_a_store_that_is_away_for_a_while_costs_the_run_nothing(files, tmp_path, server):
    url = "s3://runs-of-tests/away"
    process = command(server, STUBS, "train", write(files, tmp_path, "away", url, 12, 2))
    wait_for(tmp_path, "away", 1, process)
    server.pause()
    time.sleep(10)
    server.go_on()
    out = finish(process)
    assert json.loads(store().cat_file("runs-of-tests/away/away/summary.json"))["steps"] == 12, out[-2000:]


def test_a_store_that_is_gone_ends_the_run_with_what_to_do(files, tmp_path, server):
    url = "s3://runs-of-tests/gone"
    process = command(
        server, STUBS, "train", write(files, tmp_path, "gone", url, 12, 4), "run.store_timeout=5"
    )  # fmt: skip
    wait_for(tmp_path, "gone", 5, process)
    server.pause()
    try:
        out = finish(process, code=2)
    finally:
        server.go_on()
    assert re.search(
        r"error: .*run\.dir = 's3://runs-of-tests/gone.*no good answer for 5 s \(run\.store_timeout\)", out
    )
    assert "its last records are only in" in out and steps_of(tmp_path, "gone") >= 5
    out = finish(command(server, STUBS, "train", "--resume", f"{url}/gone", "run.store_timeout=300"))
    assert "after step 4" in out


def test_a_second_process_does_not_get_a_run_that_is_written(files, tmp_path, server):
    url = "s3://runs-of-tests/twice"
    process = command(server, STUBS, "train", write(files, tmp_path, "twice", url, 400, 100))
    wait_for(tmp_path, "twice", 1, process)
    out = finish(
        command(server, STUBS, "train", "--resume", f"{url}/twice", f"run.local_dir={tmp_path}/other"), code=2
    )
    assert "is writing this run" in out and f"pid {process.pid} on" in out
    process.send_signal(signal.SIGTERM)
    out = finish(process, code=143)
    assert f"--resume {url}/twice" in out


@pytest.fixture
def short_folder():
    """One in which Ray's sockets have names that are short enough."""
    with tempfile.TemporaryDirectory(prefix="kat-") as folder:
        yield folder


def test_commands_take_a_run_in_a_bucket(files, tmp_path, server, short_folder):
    url = "s3://runs-of-tests/commands"
    finish(command(server, REAL, "train", write(files, tmp_path, "made", url, 3, 3)))

    def kat_ray(*arguments, code=0):
        return finish(command(server, REAL, *arguments, TMPDIR=short_folder), code)

    assert "step" in kat_ray("watch", f"{url}/latest", "--once")
    assert "report.html" in kat_ray("report", f"{url}/made", "--out", tmp_path / "page")
    assert (tmp_path / "page" / "report.html").is_file()
    kat_ray("replay", f"{url}/made", "--out", tmp_path / "replay")
    kat_ray("export", f"{url}/made", "--to", tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()
    kat_ray("export", f"{url}/made/checkpoints/step-3", "--to", tmp_path / "again")
    assert "avg@k" in kat_ray("eval", f"{url}/made")
    assert "can be listed" in kat_ray("doctor", tmp_path / "made.yaml")
    assert "copy the run into a folder" in kat_ray("track", f"{url}/made", code=2)
    assert "copy" in kat_ray("report", f"{url}/made", "--gradients", code=2)
    assert "no run there" in kat_ray("report", f"{url}/nothing", code=2)


@pytest.mark.parametrize(
    ("changes", "environment", "words"),
    [
        (["run.dir=s3://no-such-bucket/runs"], {}, r"make the bucket 'no-such-bucket' first"),
        (["run.dir=ftp://somewhere/runs"], {}, r"must be a folder, or an address of s3://BUCKET/FOLDER"),
        (["run.dir=s3://"], {}, r"must be a folder, or an address of s3://BUCKET/FOLDER"),
        (["run.dir=s3://me:secret@host/runs"], {}, r"must be a folder, or an address of|holds a secret"),
        (["run.dir=s3://runs-of-tests/x"], {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": "/no"},
         r"credentials.*AWS_ACCESS_KEY_ID"),
        (["run.dir=s3://runs-of-tests/x", "run.store_timeout=1"], {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
         r"no good answer for 1 s \(run\.store_timeout\)"),
        (["run.dir=gs://runs-of-tests/x"], {}, r"gcsfs is not installed: pip install 'kat-ray\[gs\]'"),
    ],
)  # fmt: skip
def test_what_a_user_gets_wrong_is_said_before_anything_starts(server, changes, environment, words):
    out = finish(command(server, REAL, "train", "demo", *changes, **environment), code=2)
    assert re.search(words, out), out
