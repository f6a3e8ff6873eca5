"""The members of an average of checkpoints, their shares, and their mean, a shard of it at a time.

Members may have been written under any plans. The mean is made in float64, as first + sum of share * (member - first):
of equal members it is the first, bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CinemeshError
from ...model.config import ModelConfig
from ..models import model_of
from ..storage.places import Location
from .checkpoint.alone import Fill
from .checkpoint.choosing import check_files
from .checkpoint.layout import Coordinates, Layout
from .checkpoint.loading import read_states
from .checkpoint.manifest import Manifest, read_manifest
from .checkpoint.same_model import check_model
from .validation import WEIGHTS

SUM_ERROR = 1e-9  # of shares that are to sum to one, written as decimals


@dataclass(frozen=True)
class Member:
    """A checkpoint that takes part, and what its manifest says."""

    path: Location
    found: Manifest


def read_members(paths: Sequence[Location]) -> tuple[list[Member], ModelConfig]:
    """The members, and the model that all of them are of."""
    if len({path.resolve() if isinstance(path, Path) else path for path in paths}) < len(paths) or len(paths) < 2:
        raise CinemeshError(
            f"an average of {', '.join(map(str, paths))}",
            remedy="name two checkpoints or more, each once: step-* folders; --weights weighs them",
        )
    members = [Member(path, read_manifest(path)) for path in paths]
    first = members[0]
    model = model_of(first.found.model, f"checkpoint {first.path}")
    if model.lora is not None:
        raise CinemeshError(
            f"checkpoint {first.path} holds low-rank factors: their average is not that of what they make",
            remedy="make weights of each first, with cinemesh merge",
        )
    for member in members:
        check_model(member.path, member.found, model)
        check_files(member.path, member.found)
        if not [state for state in WEIGHTS if state in member.found.states and state in first.found.states]:
            raise CinemeshError(
                f"checkpoint {member.path} holds {', '.join(member.found.states)}, and {first.path} "
                f"{', '.join(first.found.states)}",
                remedy="average checkpoints that hold the same weights",
            )
    dtypes = {str(m.path): m.found.states[s] for m in members for s in WEIGHTS if s in m.found.states}
    if len(set(dtypes.values())) > 1:
        told = ", ".join(f"{path} {dtype}" for path, dtype in dtypes.items())
        raise CinemeshError(f"members of several dtypes: {told}", remedy="average checkpoints of one dtype")
    return members, model


def read_shares(text: str | None, members: int) -> list[float]:
    """One a member, above zero, that sum to one; None: equal ones. Raises CinemeshError for others."""
    if text is None:
        return [1 / members] * members
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise CinemeshError(f"--weights {text!r:.200} are no numbers", remedy="write for example 0.5,0.3,0.2") from None
    if len(shares) != members:
        raise CinemeshError(f"--weights {text} are {len(shares)}, of {members} checkpoints", remedy="give one to each")
    if not all(share > 0 and math.isfinite(share) for share in shares):
        raise CinemeshError(f"--weights {text}: each must be a number above 0", remedy="leave a member out instead")
    if abs(math.fsum(shares) - 1) > SUM_ERROR:
        raise CinemeshError(
            f"--weights {text} sum to {math.fsum(shares):.12g}, not to 1",
            remedy="an average of weights keeps their size: divide each by the sum",
        )
    return shares


def mean_of(members: Sequence[Member], shares: Sequence[float]) -> Fill:
    """What puts the average at any coordinates of any layout into flat buffers, a state after the other."""

    def fill(layout: Layout, at: Coordinates, flats: dict[str, Tensor]) -> None:
        for state, flat in flats.items():
            first, other = (torch.empty(flat.numel(), dtype=torch.float64) for _ in range(2))
            read_states(members[0].path, members[0].found, layout, at, {state: first})
            total = first.clone()
            for member, share in zip(members[1:], shares[1:], strict=True):
                read_states(member.path, member.found, layout, at, {state: other})
                total.add_(other.sub_(first), alpha=share)
            flat.copy_(total.view(flat.shape))

    return fill
