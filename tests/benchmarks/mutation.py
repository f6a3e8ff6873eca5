"""Measured: how many small faults of the package the tests find. Needs no GPU; an hour or more, and resumable.

    python tests/benchmarks/mutation.py WORK [--count N] [--seed S] [--revision R]
    python tests/benchmarks/mutation.py NEW --again WORK        what survived in WORK, against a later revision
    python tests/benchmarks/mutation.py WORK --reach            first, for later trials: which tests run which lines
    python tests/benchmarks/mutation.py WORK --report FILE      what WORK holds, as the result that is committed

WORK is a folder outside the repository; it gets a copy of revision R, and only the copy is ever changed. A mutant
(``mutants.py``) is run against the tests that run its line (``reach.py``; where WORK does not say, those near its
file, ``nearness.py``), until one fails or a budget of CPU time is spent; every verdict is written at once to
WORK/results.jsonl. A mutant with which its module cannot be imported is not counted. Verdicts: ``killed`` by the
test named, which passes without the change; ``hung`` in it; ``survived``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.mutants import FOLDERS, Mutant, draw
from benchmarks.nearness import rank
from benchmarks.reach import Reach, Watched, block_of, order
from benchmarks.trial import OPTIONS, Log, Tests, Untimed, file_of, fresh, runs_later, swap

ROOT = Path(__file__).parents[2]
COUNT, SEED = 200, 11
BUDGET_S = 60.0  # CPU seconds of a mutant, all its processes
STUCK_S = 240.0  # in which no process could run: the pool gives up after 120
STUCK_SHARE = 0.75  # of the budget: a test that runs so long when it ends
FILES = 12  # test files that a fresh process collects
TESTS = 400  # or tests
POLL_S = 0.2


@dataclass(frozen=True)
class Result:
    """``test``: that failed or hung. ``ran``: tests run. ``reached``: some ran the function that was changed."""

    mutant: Mutant
    verdict: str
    test: str | None
    ran: int
    reached: bool
    cpu_s: float


def make_copy(work: Path, revision: str) -> None:
    """A copy of the repository at ``revision``, with the programs of this environment; one that is there is mended."""
    copy, named = work / "copy", work / "revision"
    if not named.exists():
        copy.mkdir(parents=True)
        (copy / ".venv/typing").mkdir(parents=True)
        (copy / ".venv/typing/cinemesh").symlink_to("../..")
        for part in (ROOT / ".venv").iterdir():
            if part.name != "typing":
                (copy / ".venv" / part.name).symlink_to(part.resolve())
        command = ["git", "rev-parse", revision]
        named.write_text(subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout)
    command = ["git", "archive", named.read_text().strip()]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(copy, filter="data")


def enter(work: Path) -> Path:
    """This process and all that it starts import the copy, and leave nothing outside WORK."""
    copy, temporary = work / "copy", work / "tmp"
    temporary.mkdir(exist_ok=True)
    imports = str(copy / ".venv/typing")
    os.environ |= {"PYTHONPATH": imports, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    sys.path.insert(0, imports)
    os.chdir(copy)
    return copy


def change(path: Path, source: bytes) -> None:
    """Write a source file; its pyc would be taken for the new one's if size and second are the same."""
    path.write_bytes(source)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


def spent(session: int) -> tuple[float, bool]:
    """CPU seconds of a session's processes and of those that they waited for; whether one of them could run now."""
    ticks, running = 0, False
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))
            running |= fields[0] == "R"
    return ticks / os.sysconf("SC_CLK_TCK"), running


class Trials:
    """Pytest plugin: every test is collected once, and ``count`` mutants that can be imported are run in forks."""

    def __init__(self, work: Path, mutants: Iterable[Mutant], count: int, budget_s: float) -> None:
        self.work, self.mutants, self.count, self.budget_s = work, mutants, count, budget_s
        self.copy = work / "copy"
        self.results = work / "results.jsonl"
        self.reaches = Reach.read(work / "reach.jsonl")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of running the tests."""
        done = {result.mutant: result for result in read(self.work)}
        counted = 0
        for mutant in self.mutants:
            if counted == self.count:
                break
            if mutant not in done:
                done[mutant] = result = self.verdict(mutant, session.items)
                with self.results.open("a") as out:
                    out.write(json.dumps(asdict(result)) + "\n")
                line = f"{result.verdict:9}{result.cpu_s:5.0f} s  {told(mutant)}  {result.test or ''}"
                print(line, file=sys.__stderr__)
            counted += done[mutant].verdict != "invalid"
        return True

    def verdict(self, mutant: Mutant, items: Sequence[pytest.Item]) -> Result:
        """Of the nearest tests."""
        path = self.copy / mutant.file
        source = path.read_bytes()
        near, named = self.nearest(mutant, source, items)
        change(path, mutant.of(source))
        try:
            later = runs_later(source, mutant)
            result = self.warm(mutant, source, near) if later and near else self.cold(mutant, named)
            if later and not result.reached and result.verdict == "survived":
                result = self.cold(mutant, named)
        finally:
            change(path, source)
        return result

    def nearest(
        self, mutant: Mutant, source: bytes, items: Sequence[pytest.Item]
    ) -> tuple[list[pytest.Item], list[str]]:
        """The tests in the order in which they are run, and the names that a fresh process gets."""
        if self.reaches:
            there = {item.nodeid: item for item in items}
            tests = order(self.reaches, mutant.file, block_of(source, mutant.line), self.budget_s)
            near = [there[test] for test in tests if test in there]
            return near, [item.nodeid for item in near[:TESTS]]
        files = sorted(set(map(file_of, items)), key=lambda test: (*rank(self.copy, mutant.file, test), test))
        near = sorted(items, key=lambda item: files.index(file_of(item)))
        return near, files[:FILES]

    def log(self) -> Log:
        """Of the next trial, empty."""
        path = self.work / "log"
        path.unlink(missing_ok=True)
        return Log(path)

    def fork(self, body: Callable[[], None]) -> int:
        """Run ``body`` in a child, in a session of its own."""
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            body()
        except BaseException:  # noqa: BLE001  the parent goes on
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(0)

    def warm(self, mutant: Mutant, source: bytes, items: Sequence[pytest.Item]) -> Result:
        """In a fork of this process."""
        log = self.log()
        plugin = Tests(log)

        def body() -> None:
            swap(self.copy / ".venv/typing/cinemesh" / mutant.file, source, mutant, log)
            plugin.run(items)

        return Result(mutant, *self.watch(self.fork(body)))

    def cold(self, mutant: Mutant, files: Sequence[str]) -> Result:
        """In a fresh process."""
        self.log()
        command = [sys.executable, __file__, str(self.work), "--fresh", mutant.file, *files]
        with (self.work / "fresh.txt").open("w") as out:
            process = subprocess.Popen(command, start_new_session=True, stdout=out, stderr=out)
        result = Result(mutant, *self.watch(process.pid))
        process.returncode = 0  # it has been waited for
        return result

    def watch(self, pid: int) -> tuple[str, str | None, int, bool, float]:
        """(verdict, test, tests run, reached, CPU seconds) of a trial; all its processes are ended."""
        test, since, cpu_before_s, cpu_s = None, time.monotonic(), 0.0, 0.0
        ended = over = stuck = False
        while not ended and not over:
            time.sleep(POLL_S)
            now_s, running = spent(pid)
            cpu_s = max(cpu_s, now_s)
            ended = os.waitpid(pid, os.WNOHANG)[0] != 0
            starts = [line for line in self.said() if line.startswith("start ")]
            if starts and starts[-1] != test:
                test, cpu_before_s = starts[-1], cpu_s
            since = time.monotonic() if running else since
            stuck = time.monotonic() - since > STUCK_S
            over = cpu_s > self.budget_s or stuck
        hung = not ended and (stuck or cpu_s - cpu_before_s > STUCK_SHARE * self.budget_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if not ended:
            os.waitpid(pid, 0)
        shutil.rmtree(self.work / "tmp", ignore_errors=True)
        (self.work / "tmp").mkdir(exist_ok=True)
        said = self.said()
        tests = [line.removeprefix("start ") for line in said if line.startswith("start ")]
        last = tests[-1] if tests else None
        if any(line.startswith("failed ") for line in said):
            verdict = "killed"
        elif hung:
            verdict = "hung"
        elif "done" in said or not ended:
            verdict, last = "survived", None
        else:  # it ended without a word: at import, or by a crash in a test
            verdict = "killed" if tests else "invalid"
        return verdict, last, len(tests), "reached" in said, round(cpu_s, 1)

    def said(self) -> list[str]:
        """What the trial has logged."""
        return (self.work / "log").read_text().splitlines()


class Reaching:
    """Pytest plugin: in place of a verdict, which tests run which lines."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of running the tests."""
        out, copy = self.work / "reach.jsonl", self.work / "copy"
        done = {reach.test for reach in Reach.read(out)}
        files = [str(path.relative_to(copy)) for folder in FOLDERS for path in sorted((copy / folder).rglob("*.py"))]
        for file in files:
            with contextlib.suppress(ImportError):  # of a package that is not installed
                importlib.import_module("cinemesh." + file.removesuffix(".py").replace("/", "."))
        watched = Watched(copy / ".venv/typing/cinemesh", files, lambda: spent(os.getsid(0))[0])
        watched.run([item for item in session.items if item.nodeid not in done], out)
        return True


def told(mutant: Mutant) -> str:
    """A mutant in a line."""
    old, new = (" ".join(text.split()) for text in (mutant.old, mutant.new))
    return f"{mutant.file}:{mutant.line} {mutant.kind}: {old[:60]} -> {new[:60]}"


def read(work: Path) -> list[Result]:
    """What was written so far."""
    path = work / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [Result(**{**(row := json.loads(line)), "mutant": Mutant(**row["mutant"])}) for line in lines]


def survivors(before: Path, copy: Path) -> Iterator[Mutant]:
    """What survived in the folder ``before``, where it now stands in ``copy``; says what is no longer there."""
    for result in read(before):
        if result.verdict == "survived":
            file = result.mutant.file
            there = (copy / file).exists()
            moved = there and result.mutant.moved((before / "copy" / file).read_bytes(), (copy / file).read_bytes())
            if moved:
                yield moved
            else:
                print(f"gone      {told(result.mutant)}", file=sys.__stderr__)


def report(work: Path, path: Path) -> None:
    """Write the list, after the tests that killed were seen to pass on the copy as it is.

    WORK/judged.json holds, by ``told`` of one that survived, what came of it: ``{"verdict": "killed later", "test"}``,
    by a test that the budget left out; ``{"verdict": "mended", "test"}``, by one written for it; ``{"verdict":
    "equivalent", "reason"}``.
    """
    results = [result for result in read(work) if result.verdict != "invalid"]
    killers = sorted({result.test for result in results if result.verdict == "killed" and result.test})
    subprocess.run([sys.executable, "-m", "pytest", *OPTIONS, *killers], check=True)
    notes = work / "judged.json"
    judged: dict[str, dict[str, str]] = json.loads(notes.read_text()) if notes.exists() else {}
    rows: list[dict[str, object]] = []
    for result in results:
        name = told(result.mutant)
        found = {"verdict": result.verdict, "test": result.test, "cpu_s": result.cpu_s}
        rows.append({"mutant": name, **found, **judged.get(name, {})})
    counts = Counter(str(row["verdict"]) for row in rows)
    about = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{os.cpu_count()}-core {platform.machine()}, no GPU",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "pytest", "hypothesis", "triton")},
        "revision": (work / "revision").read_text().strip(),
        "seed": SEED,
        "mutants_counted": len(rows),
        "counts": counts,
        "share_not_equivalent_before": round((counts["mended"] + counts["survived"]) / len(rows), 4),
        "share_not_equivalent_now": round(counts["survived"] / len(rows), 4),
    }
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(json.dumps(about, indent=1)[:-2] + f',\n "mutants": [\n{lines}\n]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutants of the package against its tests.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="CPU seconds of a mutant")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--revision", default="HEAD")
    parser.add_argument("--again", type=Path, metavar="WORK")
    parser.add_argument("--reach", action="store_true")
    parser.add_argument("--report", type=Path, metavar="FILE")
    parser.add_argument("--fresh", nargs="+", help=argparse.SUPPRESS)  # file, tests: a trial in this process
    given = parser.parse_args()
    work = given.work.resolve()
    if given.fresh:
        enter(work)
        fresh(Log(work / "log"), given.fresh[0], given.fresh[1:])
        return
    make_copy(work, given.revision)
    if given.report:
        given.report = given.report.resolve()
    copy = enter(work)
    if given.report:
        report(work, given.report)
        return
    collected = [*OPTIONS, "--ignore=tests/test_house.py", "tests"]  # it reads how files are written
    if given.reach:
        pytest.main(collected, plugins=[Reaching(work), Untimed()])
        return
    mutants = survivors(given.again.resolve(), copy) if given.again else draw(copy, given.seed)
    pytest.main(collected, plugins=[Trials(work, mutants, given.count, given.budget), Untimed()])


if __name__ == "__main__":
    main()
