"""Without a GPU, Triton kernels run under Triton's interpreter; that is decided when a kernel's module is imported."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def where_kernels_run() -> Iterator[None]:
    """Every tensor that names no device is made on the GPU, where there is one; all Triton tests ask for this."""
    with torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True)
def inputs_of_its_own(request: pytest.FixtureRequest) -> None:
    """Every case draws other inputs, and the same when run again: no sum cancels badly once in a thousand runs."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
