"""Shots into clips: lengths, the first seconds, one clip a shot; every frame belongs to one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemesh.data.curate.cutting import Cutting
from cinemesh.errors import CinemeshError


def video(shots: Sequence[int], fps: float = 25.0, gaps: Sequence[int] = ()) -> dict[str, Any]:
    """A scanned video of such shots, in frames; before the frames ``gaps`` it stands still for a second."""
    count = sum(shots)
    steps = np.full(count, 1 / fps)
    steps[list(gaps)] += 1
    change = np.zeros(count)
    change[np.cumsum([0, *shots[:-1]])] = 40.0
    numbers = {name: [1.0] * count for name in ("motion", "blur", "luma", "vector", "right", "down", "grew", "fit")}
    begins = [0.0, *np.cumsum(steps)]
    return numbers | {"id": "v", "cuts": None, "change": change.tolist(), "difference": [1.0] * count, "begins": begins}


def pieces(cutting: Cutting, scanned: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    return [(row["part"], row["shot"], row["first_frame"], row["last_frame"]) for row in cutting.clips(scanned)]


def test_a_long_shot_gives_pieces_and_a_rest() -> None:
    """16 s are 400 frames; of 1,000 frames 200 are left, which are 8 s; of 50 frames 2 s, too short."""
    assert pieces(Cutting(), video([1000, 50])) == [
        ("clip", 0, 0, 399),
        ("clip", 0, 400, 799),
        ("clip", 0, 800, 999),
        ("rest", 1, 1000, 1049),
    ]


def test_the_start_of_a_video_is_cut_and_no_other_shots() -> None:
    assert pieces(Cutting(start_s=2.0), video([200, 200])) == [
        ("start", 0, 0, 49),
        ("clip", 0, 50, 199),
        ("clip", 1, 200, 399),
    ]


def test_a_shot_gives_one_clip_from_its_middle() -> None:
    assert pieces(Cutting(least_s=12, most_s=16, one=True), video([500, 310, 100])) == [
        ("spare", 0, 0, 49),
        ("clip", 0, 50, 449),
        ("spare", 0, 450, 499),
        ("clip", 1, 500, 809),
        ("rest", 2, 810, 909),
    ]


def test_lengths_are_in_time_not_in_frames() -> None:
    """A frame that is shown for a second more ends a piece earlier."""
    assert pieces(Cutting(), video([500], gaps=[100]))[0] == ("clip", 0, 0, 374)


def test_another_change_finds_other_shots() -> None:
    assert len(pieces(Cutting(change=50.0), video([100, 100]))) == 1


def test_a_detectors_cuts_are_taken() -> None:
    assert pieces(Cutting(), video([300]) | {"cuts": [150]})[1][1:] == (1, 150, 299)


@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=6),
    st.sampled_from([None, 0.5, 3.0]),
    st.booleans(),
    st.sampled_from([7.0, 25.0, 29.97]),
)
def test_every_frame_belongs_to_one_row(shots: list[int], start_s: float | None, one: bool, fps: float) -> None:
    cutting = Cutting(least_s=2.0, most_s=5.0, start_s=start_s, one=one)
    rows = cutting.clips(video(shots, fps))
    assert [frame for row in rows for frame in range(row["first_frame"], row["last_frame"] + 1)] == [*range(sum(shots))]
    bounds = np.cumsum([0, *shots])
    for row in rows:
        assert bounds[row["shot"]] <= row["first_frame"] and row["last_frame"] < bounds[row["shot"] + 1]
        if row["part"] == "clip":
            assert 2.0 - 1e-6 <= row["seconds"] <= 5.0 + 1e-6


def test_a_clip_forgets_how_it_differs_from_the_shot_before() -> None:
    scanned = video([100, 100])
    scanned["motion"][100] = 99.0
    assert [row["motion_mean"] for row in Cutting().clips(scanned)] == [1.0, 1.0]


@pytest.mark.parametrize(("name", "value"), [("least_s", 0), ("most_s", 1e9), ("change", 0), ("start_s", -1)])
def test_a_length_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(CinemeshError, match=name):
        Cutting(**{name: value})  # type: ignore[arg-type]
