"""What bandit finds in the package: nothing that is not justified where it stands, or in ``pyproject.toml``."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_house import FOLDERS, ROOT, ROOT_MODULES

PLANTED = {
    "B602": "import subprocess\nsubprocess.run(input(), shell=True)\n",
    "B506": "import yaml\nyaml.load(open('x'), Loader=yaml.Loader)\n",
    "B301": "import pickle\npickle.load(open('x', 'rb'))\n",
    "B614": "import torch\ntorch.load('x')\n",
    "B104": "import socket\nsocket.socket().bind(('0.0.0.0', 0))\n",
    "B310": "import urllib.request\nurllib.request.urlopen(input())\n",
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bandit") is None, reason="bandit is not installed: it is among the extras of dev"
)


def found(*paths: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "bandit", "-q", "-c", str(ROOT / "pyproject.toml"), "-f", "json", "--exit-zero"]
    done = subprocess.run([*command, "-r", *map(str, paths)], capture_output=True, text=True, check=True)
    values = json.loads(done.stdout)
    assert values["errors"] == [] and values["metrics"]["_totals"]["loc"] > 0
    return values["results"]


def test_bandit_finds_nothing() -> None:
    """A pickle that is read, a shell, a socket on every interface, an unsafe loader; see the planted ones."""
    modules = [path for name in ROOT_MODULES if (path := ROOT / f"{name}.py").exists()]
    told = [f"{one['filename']}:{one['line_number']} {one['test_id']} {one['issue_text']}"
            for one in found(*modules, *(ROOT / folder for folder in FOLDERS))]  # fmt: skip
    assert told == []


def test_what_is_planted_is_found(tmp_path: Path) -> None:
    """By the same configuration: a rule that it skips would be missing here."""
    for rule, text in PLANTED.items():
        (tmp_path / f"{rule.lower()}.py").write_text(text)
    assert {one["test_id"] for one in found(tmp_path)} >= {*PLANTED}
