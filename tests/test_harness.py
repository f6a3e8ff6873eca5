"""Forked ranks touch nothing of the process that forked them: its garbage, its threads, its modules."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Pool

from cinemesh.launch.cluster.processes import forked

marks: list[str] = []


class Decoder:
    """Garbage as a decoder leaves it: a circle, freed by the collector alone, whose end belongs to the process."""

    def __init__(self, freed: Path) -> None:
        self.freed, self.itself = freed, self

    def __del__(self) -> None:
        (self.freed / str(os.getpid())).touch()


def collected() -> int:
    gc.collect()
    return os.getpid()


def marked() -> list[str]:
    gc.collect()
    return marks


@pytest.fixture
def litter(tmp_path: Path) -> Iterator[Path]:
    gc.disable()
    Decoder(tmp_path)
    yield tmp_path
    gc.enable()


def test_a_forked_rank_frees_nothing_of_its_parent(litter: Path) -> None:
    """A freed decoder joins threads that a fork does not copy: a rank that dies or hangs, once in many runs."""
    forked(2, collected)
    assert not list(litter.iterdir())
    gc.collect()
    assert [path.name for path in litter.iterdir()] == [str(os.getpid())]


def test_the_pool_does_not_descend_from_the_tests(pool: Pool, litter: Path) -> None:
    """A pool that is started again in the middle of a run is as clean as the first."""
    marks.append("by the process of the tests")
    pool.close()
    assert pool.run(2, marked) == [[], []]
    assert not list(litter.iterdir())
