"""A model's numbers: each has a range, and what is no number of it is refused by name."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.model.config import PRESETS, Encoder, LatentCondition, preset


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


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_in_range(name: str) -> None:
    assert replace(preset(name)) == preset(name)
