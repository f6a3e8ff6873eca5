"""The rules of the Chrome trace format that viewers rely on, for tests of what is written."""

from __future__ import annotations

from typing import Any

Event = dict[str, Any]


def tracks(events: list[Event]) -> dict[int, list[str]]:
    """By process: the names of its threads, in the order in which a viewer shows them. Checks that each has one."""
    named = [event for event in events if event["ph"] == "M" and event["name"] == "thread_name"]
    order = {(e["pid"], e["tid"]): e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    assert len({(event["pid"], event["tid"]) for event in named}) == len(named) == len(order)
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} <= order.keys(), "a slice on a track without a name"
    named.sort(key=lambda event: order[event["pid"], event["tid"]])
    return {pid: [e["args"]["name"] for e in named if e["pid"] == pid] for pid in {e["pid"] for e in named}}


def overlaps(events: list[Event]) -> list[tuple[Event, Event]]:
    """Pairs of complete events of one thread of which neither holds the other: "must be properly nested".

    In whole nanoseconds, which is what viewers read; a slice that takes no time may touch an end.
    """
    found: list[tuple[Event, Event]] = []
    by_track: dict[tuple[int, int], list[tuple[int, int, Event]]] = {}
    for event in events:
        if event["ph"] == "X":
            start, duration = round(event["ts"] * 1e3), round(event["dur"] * 1e3)
            assert start >= 0 and duration >= 0, event
            by_track.setdefault((event["pid"], event["tid"]), []).append((start, start + duration, event))
    for slices in by_track.values():
        open_: list[tuple[int, Event]] = []
        for start, end, event in sorted(slices, key=lambda slice_: (slice_[0], -slice_[1])):
            while open_ and open_[-1][0] <= start:
                open_.pop()
            if open_ and end > open_[-1][0]:
                found.append((open_[-1][1], event))
            open_.append((end, event))
    return found
