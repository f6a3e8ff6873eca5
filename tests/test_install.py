"""What an install leaves alone: the torch of a cluster's image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def would_install(folder: Path, needed: list[str], torch: str) -> list[str]:
    """What pip would bring beside a torch of such a version, found before the one that is installed here."""
    known = folder / f"torch-{torch}.dist-info"
    known.mkdir()
    (known / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")
    (known / "RECORD").touch()
    (known / "INSTALLER").write_text("image\n")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-index", "--report", "-")
    offline = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        [*pip, *needed],
        env=offline | {"PYTHONPATH": str(folder), "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        assert "torch" in done.stderr, done.stderr  # nothing here satisfies what is asked
        return ["torch"]
    return [each["metadata"]["name"] for each in json.loads(done.stdout)["install"]]


@pytest.mark.parametrize("torch", ["2.11.0a0+nv", "2.12.1+cu130", "2.14.1"])
def test_the_torch_of_an_image_stays(torch: str, tmp_path: Path) -> None:
    """A vendor's build is a pre-release: a pin or a plain minimum would put gigabytes of another torch over it."""
    assert would_install(tmp_path, NEEDED, torch) == []


@pytest.mark.parametrize("wanted", ["torch==2.13.0", "torch>=2.11", "torch>=2.11.0"])
def test_other_requirements_would_replace_it(wanted: str, tmp_path: Path) -> None:
    needed = [wanted if each.startswith("torch>") else each for each in NEEDED]
    assert "torch" in would_install(tmp_path, needed, "2.11.0a0+nv")


def test_what_run_installs_is_the_torch_that_is_tested() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert "--constraint constraints.txt" in (ROOT / "run").read_text()
    import torch

    assert torch.__version__.split("+")[0] == pins["torch"]
