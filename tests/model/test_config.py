"""A model's numbers: each has a range, and what is no number of it is refused by name."""

from __future__ import annotations

import re
import zlib
from dataclasses import replace
from typing import Any

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.model.config import MOST_SIZE, PRESETS, Encoder, LatentCondition, parameters, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import check
from cinemesh.parallel.ir.fields import MOST_BLOCKS
from cinemesh.parallel.ir.plan import Plan


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


def test_elements_that_one_counter_would_draw_alike_are_refused() -> None:
    """Beyond 2**34 of one tensor, element / 4 is more than the counter's 32 bits, and values repeat."""
    tall = replace(preset("tiny"), patch=(1, 1, 1), position_lengths=(1 << 24, 256, 2))
    check(tall, Plan(), BatchShape(1, (1 << 24, 256, 1)))
    latent = rf"channels\(4\) of a latent 16777216x256x2 are {1 << 35} elements > {1 << 34}"
    with pytest.raises(CinemeshError, match=latent):
        check(tall, Plan(), BatchShape(1, (1 << 24, 256, 2)))
    wide = replace(preset("tiny"), width=1 << 15, heads=1 << 8, ffn=1 << 19)
    assert max(row.elements for row in parameters(wide)) == 1 << 34
    with pytest.raises(
        CinemeshError, match=rf"gate \[32768, 524289\] has {(1 << 34) + (1 << 15)} elements > {1 << 34}"
    ):
        parameters(replace(wide, ffn=(1 << 19) + 1))


@pytest.mark.parametrize("name", PRESETS)
def test_the_parameters_of_a_preset_draw_apart(name: str) -> None:
    """The counter's word for a parameter is a hash of its name, 32 bits: two alike would have the same values."""
    names = [row.name for row in parameters(preset(name))]
    assert len({zlib.crc32(name.encode()) for name in names}) == len(names)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_in_range(name: str) -> None:
    assert replace(preset(name)) == preset(name)
