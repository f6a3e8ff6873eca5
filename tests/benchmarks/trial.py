"""One mutant against tests: what runs in the process that is changed.

A warm process has collected every test; a fork of it gets the code of the changed functions put into them (``swap``).
What stands in a module's or a class's body, or runs at import only, needs a fresh process instead.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from benchmarks.mutants import Mutant
from benchmarks.reach import put

OPTIONS = ("-p", "no:cacheprovider", "-p", "no:terminal")
REACHED = "__reached__"  # builtin that a changed function calls


class Log:
    """What a trial says while it runs, a line each: start ID, reached, failed ID, invalid, done."""

    def __init__(self, path: Path) -> None:
        self.out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(self, text: str) -> None:
        """Written at once: the process may be killed."""
        os.write(self.out, f"{text}\n".encode())


def file_of(item: pytest.Item) -> str:
    """The file of a test, as its name says it."""
    return item.nodeid.partition("::")[0]


class Untimed:
    """Pytest plugin: a slow machine is no fault of a mutant."""

    def pytest_configure(self) -> None:
        """Before tests are collected."""
        import hypothesis  # pytest rewrites its plugins' modules: none may be loaded before

        hypothesis.settings.register_profile("untimed", deadline=None)
        hypothesis.settings.load_profile("untimed")


class Tests(Untimed):
    """Pytest plugin: runs ``items`` until one fails, and says so."""

    def __init__(self, log: Log, order: Sequence[str] = ()) -> None:
        self.log, self.order, self.failed = log, order, False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Any phase of a test."""
        self.failed = self.failed or report.failed

    def run(self, items: Sequence[pytest.Item]) -> None:
        """Until one fails."""
        plugins = items[0].config.pluginmanager
        if not plugins.is_registered(self):
            plugins.register(self)
        for item, following in zip(items, (*items[1:], None), strict=True):
            self.log.say(f"start {item.nodeid}")
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                self.log.say(f"failed {item.nodeid}")
                return
        self.log.say("done")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In a fresh process: what was collected, in the order of its files or tests."""
        places = {name: place for place, name in enumerate(self.order)}
        self.run(sorted(session.items, key=lambda item: places.get(item.nodeid, places.get(file_of(item), 0))))
        return True


def _with_probe(source: bytes, mutant: Mutant) -> ast.Module:
    """The changed source, in which the innermost function around the change says that it runs."""
    tree = ast.parse(mutant.of(source))
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.body[0].lineno <= mutant.line <= (node.end_lineno or 0)
    ]
    probe = ast.parse(f"{REACHED}()").body[0]
    for node in ast.walk(probe):
        if isinstance(node, (ast.expr, ast.stmt)):
            node.lineno = node.end_lineno = max(around, key=lambda node: node.lineno).body[0].lineno
            node.col_offset = node.end_col_offset = 0
    max(around, key=lambda node: node.lineno).body.insert(0, probe)
    return tree


def swap(path: Path, source: bytes, mutant: Mutant, log: Log) -> None:
    """Give every function of the file ``path`` its code in the changed source; forget what was computed before."""
    reached: list[bool] = []

    def probe() -> None:
        if not reached:
            reached.append(True)
            log.say("reached")

    setattr(builtins, REACHED, probe)
    put({str(path): compile(_with_probe(source, mutant), str(path), "exec")})


def runs_later(source: bytes, mutant: Mutant) -> bool:
    """Whether the change stands in the body of a function.

    One that Triton compiles is read from the disk when it first runs, under the interpreter too.
    """
    return any(
        isinstance(node, ast.FunctionDef) and node.body[0].lineno <= mutant.line <= (node.end_lineno or 0)
        for node in ast.walk(ast.parse(source))
    )


def fresh(log: Log, file: str, tests: Sequence[str]) -> None:
    """A trial in this process: the changed file lies on the disk; nothing of the package is loaded."""
    try:
        importlib.import_module("cinemesh." + file.removesuffix(".py").replace("/", "."))
    except BaseException:  # noqa: BLE001  whatever a changed module does when it is loaded
        log.say("invalid")
        return
    pytest.main([*OPTIONS, *tests], plugins=[Tests(log, tests)])
