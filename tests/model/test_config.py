"""A model's numbers: each has a range, and what is no number of it is refused by name."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.model.config import MOST_SIZE, PRESETS, Encoder, LatentCondition, preset
from cinemesh.parallel.ir.fields import MOST_BLOCKS


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None, 10**30], ids=repr)
@pytest.mark.parametrize(
    ("field", "what"),
    [
        *((name, name) for name in ("layers", "width", "heads", "ffn", "channels")),
        ("patch", "patch of H"),
        ("position_lengths", "positions of H"),
        ("encoders", "width of text encoder ul2"),
        ("latent_conditions", "channels of latent condition low"),
    ],
)
def test_every_number_of_a_model_has_a_range(field: str, what: str, value: Any) -> None:
    whole = {
        "patch": (1, value, 2),
        "position_lengths": (1, value, 2),
        "encoders": (Encoder("ul2", value, 3),),
        "latent_conditions": (LatentCondition("low", value),),
    }.get(field, value)
    said = f"{what}({value}) > " if value == 10**30 else f"{what} is {value!r}; it must be a whole number of at least 1"
    with pytest.raises(CinemeshError, match=re.escape(f"model tiny: {said}")):
        replace(preset("tiny"), **{field: whole})


@pytest.mark.parametrize(
    "changes",
    [
        dict.fromkeys(("layers", "width", "heads", "ffn", "channels"), 1),
        {"layers": MOST_BLOCKS, "width": MOST_SIZE, "heads": MOST_SIZE, "ffn": MOST_SIZE, "channels": MOST_SIZE},
    ],
    ids=["least", "most"],
)
def test_the_ends_of_a_range_belong_to_it(changes: dict[str, int]) -> None:
    end = changes["width"]
    others = {"patch": (end,) * 3, "position_lengths": (end,) * 3, "encoders": (Encoder("a", end, end),)}
    made = replace(preset("tiny"), **changes, **others, latent_conditions=(LatentCondition("low", end),))
    assert made.head_dim == 1
    if end > 1:
        for name, value in changes.items():
            with pytest.raises(CinemeshError, match=re.escape(f"{name}({value + 1}) > {value}")):
                replace(made, **{name: value + 1})


def test_a_latent_uses_its_tables_whole_and_no_further() -> None:
    config = replace(preset("tiny"), patch=(1, 2, 2), position_lengths=(3, 4, 5))
    assert config.grid((3, 8, 10)) == (3, 4, 5)
    for latent, what in (((4, 8, 10), "T(4)"), ((3, 10, 10), "H(10)"), ((3, 8, 12), "W(12)"), ((0, 8, 10), "T(0)")):
        with pytest.raises(CinemeshError, match=re.escape(what)):
            config.grid(latent)
    with pytest.raises(CinemeshError, match=r"H\(7\) is no positive multiple of the patch \(2\)"):
        config.grid((3, 7, 10))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_in_range(name: str) -> None:
    assert replace(preset(name)) == preset(name)
