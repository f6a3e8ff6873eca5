"""A pytest plugin: a line of JSON for every test, written when it ends, so that a killed run has told its part.

``-p benchmarks.on_card.reported --outcomes FILE``
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

Report = pytest.TestReport | pytest.CollectReport


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True)


@pytest.hookimpl
def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    assert isinstance(path, Path)
    config.pluginmanager.register(_Lines(path))


class _Lines:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # set-up and tear-down where they did not pass
            self._write(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report)

    def _write(self, report: Report) -> None:
        said = ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash is not None else str(report.longrepr)
        elif report.skipped and isinstance(report.longrepr, tuple):
            said = report.longrepr[2]
        line = {"test": report.nodeid, "outcome": report.outcome, "said": said[:500]}
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
