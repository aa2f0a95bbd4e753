"""A real S3 server on loopback (moto's), in a process of its own.

It keeps objects in memory, so it is not started again: `pause` holds it, as a network does that is cut.
`python -m tests.support.bucket_server PORT` is that process.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec

from tests.deploy.ray_process import free_port

KEY, SECRET = "loopback-access-key", "loopback-secret-key/never-shown"
NEEDED = ("s3fs", "moto", "flask")


def missing():
    """Packages that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


class BucketServer:
    """The server's process."""

    def __init__(self, port):
        self.port = port
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.bucket_server", str(port)], stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout.readline() == "up\n"

    @property
    def environment(self):
        """By which a process finds it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def pause(self):
        """It does not answer any more."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self):
        """It does again."""
        self.process.send_signal(signal.SIGCONT)

    def end(self):
        """For good."""
        self.go_on()
        self.process.kill()
        self.process.wait()


@contextmanager
def bucket_server():
    """A server without buckets."""
    server = BucketServer(free_port())
    try:
        yield server
    finally:
        server.end()


def serve(port):
    """Until it is killed."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False).start()
    print("up", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1.0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
