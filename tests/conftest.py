"""What every test shares: one thread a process, and no GPU test skipped without saying so."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch loads: its workers share the cores of one machine

from collections.abc import Iterator

import pytest
from browser import CHROMIUM, Browser
from harness import pool as pool  # the fixture, for every test


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium with one page."""
    if not CHROMIUM:
        pytest.skip("no Chromium is installed")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` without a CUDA device; torch is loaded only if there are any."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
