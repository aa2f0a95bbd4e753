"""The browser in which pages are opened."""

import pytest

from tests.support.chromium import chromium


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as session:
        yield session
