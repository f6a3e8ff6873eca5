"""Runs of curation for the tests of this folder."""

from pathlib import Path
from typing import Any

import pytest
from planted_clips import curate, write_planted

from cinemesh.data.curate.pipeline import Outcome


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """The folder of planted clips, and by file what must drop its clips."""
    folder = tmp_path_factory.mktemp("planted") / "clips"
    return folder, write_planted(folder)


@pytest.fixture(scope="session")
def curated(planted: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Them, curated: the folder with the tables, and what the run came to."""
    out = tmp_path_factory.mktemp("curated")
    return out, curate({"sources": [str(planted[0])]}, out)
