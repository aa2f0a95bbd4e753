"""What the tests of manifests need beside Python; CI requires it, elsewhere a test says what it lacks."""

import os
import shutil

import pytest

from tests.deploy.crd import ENVIRONMENT, crd_folder

REQUIRED = bool(os.environ.get("KAT_RAY_REQUIRE_DEPLOY"))  # set by .ci/run


def lacking(what: str) -> None:
    """Skip, or fail where everything must be there."""
    if REQUIRED:
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def crds():
    """Folder with KubeRay's CRDs."""
    folder = crd_folder()
    if folder is None:
        lacking(f"{ENVIRONMENT} is not set: docs/kubernetes.md says where to get KubeRay's CRDs")
    return folder


@pytest.fixture(scope="module")
def openssl():
    """Makes the certificate of the stub of Kubernetes."""
    if shutil.which("openssl") is None:
        lacking("openssl is not installed (Debian: apt install openssl)")
