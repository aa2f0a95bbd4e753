"""What the tests of manifests take."""

import shutil

import pytest

from tests.deploy.crd import ENVIRONMENT, crd_folder
from tests.support.lacking import lacking


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
