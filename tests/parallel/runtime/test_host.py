"""Copies to and from the host: what is asked of CUDA and in which order, without a GPU, and what a CPU does."""

from __future__ import annotations

import gc
import mmap
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.parallel.ir.records import Space
from cinemesh.parallel.runtime import host
from cinemesh.parallel.runtime.host import HostLink, pin
from cinemesh.parallel.runtime.ledger import Entry


@pytest.fixture
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of CUDA's streams and events, in order."""
    asked: list[str] = []

    class Stream:
        def __init__(self, device: str, name: str = "") -> None:
            made.append(self)
            self.name = name or f"copies {len(made)}"

        def wait_stream(self, other: Stream) -> None:
            asked.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: Event) -> None:
            asked.append(f"{self.name} waits for the event of {event.of}")

    class Event:
        of = "nothing"

        def record(self, stream: Stream) -> None:
            self.of = stream.name
            asked.append(f"event on {stream.name}")

    @contextmanager
    def on(stream: Stream) -> Any:
        asked.append(f"copy on {stream.name}")
        yield

    made: list[Stream] = []
    compute = Stream("cuda", "compute")
    made.clear()
    pretended = {"Stream": Stream, "Event": Event, "stream": on, "current_stream": lambda: compute}
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, value)
    runtime = SimpleNamespace(
        cudaError=SimpleNamespace(success=0),
        cudaHostRegister=lambda address, size, flags: asked.append(f"pin {size}") or 0,
        cudaHostUnregister=lambda address: asked.append("unpin"),
    )
    monkeypatch.setattr(host, "cudart", lambda: runtime)
    return asked


def test_a_copy_runs_behind_compute_before_its_issue_and_before_compute_behind_its_wait(
    pretend_cuda: list[str],
) -> None:
    """An edge that is missing here is a race on a GPU; each way has a stream, or one would wait for the other."""
    link = HostLink(64, "cuda")
    assert pretend_cuda == ["pin 64"], "so many bytes, not the next power of two"
    ways = [link.bind(to, torch.ones(4), torch.zeros(4)) for to in Space]
    for i in range(len(ways)):
        pretend_cuda.clear()
        ways[i].issue()
        ways[i].wait()
        name = pretend_cuda[0].split(" waits")[0]
        told = [f"{name} waits for compute", f"copy on {name}", f"event on {name}"]
        assert pretend_cuda == [*told, f"compute waits for the event of {name}"]
    assert len({str(stream) for stream in link.streams.values()}) == 2
    pretend_cuda.clear()
    other = HostLink(32, "cuda", link.arena)
    assert other.arena is link.arena and pretend_cuda == [], "one arena for all buckets"
    del link, other, ways
    gc.collect()
    assert pretend_cuda == ["unpin"]


@pytest.mark.parametrize("make", [torch.empty, lambda size, dtype: torch.frombuffer(mmap.mmap(-1, size), dtype=dtype)])
def test_memory_is_pinned_as_long_as_a_view_of_it_is_there(pretend_cuda: list[str], make: Any) -> None:
    """Copies of the states are parts of one tensor, which nobody keeps: they were pinned until it was cut."""
    memory = make(64, dtype=torch.uint8)
    pin(memory, "a test", "none")
    rows = list(memory.view(torch.float32).view(4, -1))
    del memory
    gc.collect()
    assert pretend_cuda == ["pin 64"]
    del rows[1:]
    gc.collect()
    assert pretend_cuda == ["pin 64"]
    rows.clear()
    gc.collect()
    assert pretend_cuda == ["pin 64", "unpin"]


@pytest.mark.usefixtures("pretend_cuda")
def test_a_process_that_ends_waits_for_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is unpinned when it goes, not when Python does: a rank that failed may have a stuck collective there."""
    made = list[Any]()
    monkeypatch.setattr(host.weakref, "finalize", lambda *_: made.append(SimpleNamespace(atexit=True)) or made[-1])
    pin(torch.empty(64, dtype=torch.uint8), "a test", "none")
    assert [one.atexit for one in made] == [False]


def test_memory_that_cannot_be_pinned_is_refused(pretend_cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(cudaError=SimpleNamespace(success=0), cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(host, "cudart", lambda: runtime)
    with pytest.raises(CinemeshError, match=r"offload: 64 B of host memory cannot be pinned: 2"):
        HostLink(64, "cuda")


def test_on_a_cpu_a_copy_is_done_when_it_is_issued() -> None:
    link = HostLink(32, "cpu")
    assert link.arena.numel() == 32 and HostLink(0, "cpu").arena.numel() == 0
    source, target = torch.arange(4.0), torch.zeros(4)
    copy = link.bind(Space.HOST, source, target)
    copy.issue()
    assert torch.equal(target, source) and link.ledger == []
    link.record = True
    copy.issue()
    copy.wait()
    assert link.ledger == [Entry("to_host", "to_host", "to_host", 16)]
