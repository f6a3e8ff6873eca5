"""A step that does not end is noticed, one that ends is not; one rank's failure is every rank's."""

from __future__ import annotations

import threading

import pytest
import torch

from cinemesh.parallel.runtime.watchdog import Heartbeat, vote


def test_the_heartbeat_speaks_when_a_step_does_not_end() -> None:
    stalled: list[str] = []
    spoke = threading.Event()

    def on_stall(message: str) -> None:
        stalled.append(message)
        spoke.set()

    heartbeat = Heartbeat(stall_s=0.05, on_stall=on_stall, period_s=0.01)
    heartbeat.expect(7, lambda: False)
    assert spoke.wait(10)
    heartbeat.close()
    assert len(stalled) == 1 and "replay of step 7 has not finished" in stalled[0]


def test_the_heartbeat_is_quiet_about_steps_that_end() -> None:
    asked = threading.Event()

    def done() -> bool:
        asked.set()
        return True

    stalled: list[str] = []
    heartbeat = Heartbeat(stall_s=0.0, on_stall=stalled.append, period_s=0.01)
    heartbeat.expect(1, done)
    assert asked.wait(10)
    heartbeat.close()
    assert stalled == []


@pytest.mark.parametrize("device", ["cuda", "cuda:5"])
def test_its_thread_takes_the_device_before_it_asks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins on GPU 0: asked there, an event of another makes a context in that GPU's memory.

    A device without an index is that of who makes the heartbeat; torch takes none such.
    """
    order: list[object] = []
    asked = threading.Event()

    def done() -> bool:
        order.append("asked")
        asked.set()
        return True

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: order.append(device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    heartbeat = Heartbeat(period_s=0.01, device=device)
    heartbeat.expect(1, done)
    assert asked.wait(10)
    heartbeat.close()
    assert order == [5, "asked"]


def test_a_vote_names_the_first_rank_that_failed() -> None:
    assert vote(None, None) is None
    assert vote("mb0/x (silu): no", None) == "rank 0: mb0/x (silu): no"
