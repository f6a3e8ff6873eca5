"""Local ranks: who listens where, who speaks when one is lost, and how Ctrl-C ends them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from cinemesh.errors import CinemeshError
from cinemesh.interrupt import INTERRUPTED, Interrupted, deaf_children, interrupt
from cinemesh.launch import cli
from cinemesh.launch.cluster import processes
from cinemesh.launch.cluster.meeting import Meeting
from cinemesh.launch.cluster.processes import StopSignal, forked, joined, launch
from cinemesh.parallel.ir.nccl_stack import NcclStack
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.comm import barrier

pytestmark = pytest.mark.usefixtures("one_process")

# Rank 0 writes down every address on which this job's processes listen, then waits for a rank that is killed.
LISTENING = """
import os, signal
from pathlib import Path
from cinemesh.launch.cluster.meeting import Meeting
from cinemesh.launch.cluster.processes import joined
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.comm import barrier

def sockets(pid):
    found = [Path(entry) for entry in os.scandir(f"/proc/{pid}/fd")]
    links = [os.readlink(path) for path in found if path.is_symlink()]
    return {link[8:-1] for link in links if link.startswith("socket:[")}

with joined(Plan(dp_shard=2), "cpu") as place:
    barrier()
    if place.rank == 0:
        launcher = os.getppid()
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        mine = set().union(*(sockets(pid) for pid in (launcher, *children)))
        rows = [row.split() for name in ("tcp", "tcp6") for row in open(f"/proc/net/{name}").readlines()[1:]]
        Path(PATH).write_text(" ".join(row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in mine))
    barrier()
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    barrier()
"""
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}  # as /proc/net has it


@pytest.mark.skipif(sys.platform != "linux", reason="reads the socket table of /proc")
def test_a_local_job_listens_on_loopback_alone_and_a_lost_rank_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The launcher's store and gloo of both ranks; then what rank 0 says of its lost peer is not shown."""
    found = tmp_path / "listening"
    with pytest.raises(CinemeshError, match=r"^rank 1 was killed by SIGKILL; if that was the system"):
        launch(2, exec, LISTENING.replace("PATH", repr(str(found))), {})
    addresses = found.read_text().split()
    assert len(addresses) >= 1 and set(addresses) <= LOOPBACK
    assert "Traceback" not in capfd.readouterr().err


# Ranks that say who they are, then never end.
ENDLESS = """
import os, time
from pathlib import Path
from cinemesh.launch.cluster.meeting import Meeting
from cinemesh.launch.cluster.processes import forked, launch

def work(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    START
"""


def _is_alive(pid: int) -> bool:
    """A zombie is none: this process may be its reaper, and does not wait for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("start", ["launch(3, work, {folder!r})", "forked(3, lambda: work({folder!r}))"])
def test_no_rank_outlives_a_killed_launcher(start: str, tmp_path: Path) -> None:
    """Ranks that train on write checkpoints into the folder in which the job is started again."""
    script, folder = tmp_path / "endless.py", tmp_path / "ranks"
    folder.mkdir()
    script.write_text(ENDLESS.replace("START", start.format(folder=str(folder))))
    launcher = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 60.0
    while len(ranks := [int(path.name) for path in folder.iterdir()]) < 3:
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    while any(map(_is_alive, ranks)):
        assert time.monotonic() < deadline, "ranks go on without their launcher"
        time.sleep(0.05)


class _Threads(Exception):
    """How many threads a rank asks for."""


@pytest.mark.parametrize(("cores", "local", "threads"), [(12, 1, 12), (12, 4, 3), (3, 2, 1), (1, 2, 1)])
def test_local_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, cores: int, local: int, threads: int) -> None:
    """Too many threads only make a run slow: no result shows it."""

    def asked(number: int) -> None:
        raise _Threads(number)

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    for name, value in {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": local}.items():
        monkeypatch.setenv(name, str(value))
    with monkeypatch.context() as patch:  # the fixture sets the threads again
        patch.setattr(torch, "set_num_threads", asked)
        with pytest.raises(_Threads, match=f"^{threads}$"), joined(Plan(), "cpu"):
            pass


def _press(when: Callable[[], object], times: int) -> None:
    """Ctrl-C, on a thread of its own, once ``when`` holds."""

    def press() -> None:
        while not when():
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)  # one look of the launcher at its ranks, at least

    threading.Thread(target=press, daemon=True).start()


def _launcher_listens() -> bool:
    """All ranks are started, and Ctrl-C is the launcher's."""
    return isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), StopSignal)


def _children() -> set[int | None]:
    """The suite's own workers are among them."""
    return {process.pid for process in multiprocessing.active_children()}


def test_a_ctrl_c_while_ranks_start_ends_them_in_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    """The rank is importing torch: no handler of its own is there yet."""
    others = _children()
    _press(_launcher_listens, 1)
    assert launch(1, time.sleep, 600) == INTERRUPTED
    assert capfd.readouterr().err == "stopped by SIGINT\n" and _children() == others


def test_a_second_ctrl_c_does_not_wait_for_ranks_that_save(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ready = tmp_path / "ready"
    code = (
        "import time, pathlib\nfrom cinemesh.launch.cluster.processes import StopSignal\n"
        f"with StopSignal():\n    pathlib.Path({str(ready)!r}).touch()\n    time.sleep(600)"
    )
    before, others = signal.getsignal(signal.SIGINT), _children()
    _press(ready.exists, 2)
    with pytest.raises(Interrupted):
        launch(1, exec, code, {})
    assert _children() == others and capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is before


def test_a_ctrl_c_in_a_command_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "app", lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has it ignored
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


# Ctrl-C when a module is asked for, before any of ours was imported; SIGINT as a terminal's foreground job has it.
AT_IMPORT = """
import os, runpy, signal, sys

class Press:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            for _ in range({times}):
                os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Press())
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[1:] = {arguments!r}
runpy.run_module({module!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("cinemesh.launch", "typer", ["list"]),
        ("cinemesh.launch", "yaml", ["plan", "--gpus", "8"]),
        ("cinemesh.launch", "torch", ["train", "recipe.yaml"]),
        ("cinemesh.launch.train", "torch", ["recipe.yaml"]),
    ],
)
def test_a_ctrl_c_while_it_imports_is_one_line(module: str, name: str, arguments: list[str]) -> None:
    """Typer takes 0.3 s and torch 2: whoever mistyped presses it then, and twice."""
    code = AT_IMPORT.format(module=module, name=name, arguments=arguments, times=2)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (INTERRUPTED, "interrupted\n", "")


def test_of_the_ranks_of_a_machine_the_first_says_that_it_was_interrupted() -> None:
    """Under torchrun a terminal's Ctrl-C reaches all of them."""
    code = AT_IMPORT.format(module="cinemesh.launch.train", name="torch", arguments=["recipe.yaml"], times=1)
    for rank, said in ((0, "interrupted\n"), (1, "")):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (INTERRUPTED, said)


def _presses(function: Callable[..., Any], pressed: list[int]) -> Callable[..., Any]:
    """The same, and the first time a Ctrl-C behind it."""

    def call(*given: Any, **options: Any) -> Any:
        done = function(*given, **options)
        pressed.append(len(pressed))
        if len(pressed) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return done

    return call


@pytest.fixture
def hearing() -> Iterator[None]:
    """SIGINT as a command has it; a background job, which the suite may be, has it ignored."""
    before = signal.signal(signal.SIGINT, interrupt)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("way", [launch, forked])
@pytest.mark.parametrize("place", ["start", "kill"])
def test_a_ctrl_c_between_two_ranks_leaves_none(
    way: Callable[..., Any], place: str, hearing: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Between the starts of two, or the ends: all are started and then ended, and Ctrl-C is obeyed after all."""
    pressed, others = list[int](), _children()
    monkeypatch.setattr(BaseProcess, place, _presses(getattr(BaseProcess, place), pressed))
    ranks = {launch: (2, time.sleep, 60), forked: (2, lambda: time.sleep(60))}[way]
    if place == "kill":  # the ranks end at once
        ranks = {launch: (2, time.sleep, 0), forked: (2, lambda: None)}[way]
    with pytest.raises(Interrupted):
        way(*ranks)
    assert len(pressed) == 2 and _children() == others
    assert "Traceback" not in capfd.readouterr().err


def test_ranks_hear_no_ctrl_c_before_they_listen_themselves(tmp_path: Path) -> None:
    """While they import torch it is blocked, by a mask that exec keeps; then ignored, until a run has its handler."""
    found = tmp_path / "found"
    state = "import signal; from pathlib import Path; " + (
        f"Path({str(found)!r}).write_text(f'{{signal.getsignal(2)}} {{signal.pthread_sigmask(0, [])}}')"
    )
    assert launch(1, exec, state, {}) == 0
    assert found.read_text() == f"{signal.SIG_IGN} set()"
    with deaf_children():
        seen = subprocess.run(
            [sys.executable, "-c", "import signal; print(signal.pthread_sigmask(0, []))"],
            capture_output=True,
            check=True,
        )
    assert seen.stdout.split() == [b"{<Signals.SIGINT:", b"2>}"]
    assert signal.SIGINT not in signal.pthread_sigmask(0, [])


def _lost_or_refused(refused: bool) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        if refused:
            raise CinemeshError("the cause", remedy="the remedy")
        os.kill(os.getpid(), signal.SIGKILL)
    barrier()


@pytest.mark.parametrize(
    ("refused", "said"), [(True, "the cause; the remedy"), (False, "rank 1 was killed by SIGKILL")]
)
def test_of_forked_ranks_the_cause_speaks(refused: bool, said: str) -> None:
    """Rank 0 sees no more than a lost connection."""
    with pytest.raises(CinemeshError, match=said):
        forked(2, lambda: _lost_or_refused(refused))


@pytest.mark.parametrize(("driver", "rank", "says"), [((12, 8), 0, True), ((12, 8), 1, False), ((12, 9), 0, False)])
def test_what_nccl_and_driver_take_is_said_once_when_the_job_starts(
    driver: tuple[int, int], rank: int, says: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In silence a captured step would lose all overlap between axes."""

    class Told(Exception): ...

    def started(*_: object) -> None:
        raise Told

    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    stands_for: dict[str, Any] = {
        "device_here": lambda wanted, local: "cuda:0",
        "meet_alike": lambda *_: Meeting(HashStore(), "a", rank, 2),
        "claim": lambda *_: None,
        "set_up_nccl": lambda: None,
        "nccl_stack": lambda: NcclStack((2, 28), driver),
        "start_job": started,
    }
    for name, value in stands_for.items():
        monkeypatch.setattr(processes, name, value)
    with pytest.raises(Told), joined(Plan(tp=2), "auto"):
        pass
    said = capfd.readouterr().err
    assert ("WARNING: NCCL 2.28 on a driver of CUDA 12.8 runs captured collectives of different axes" in said) == says
