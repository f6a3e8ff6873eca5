"""``cinemesh average``: the weights of several checkpoints, averaged into one (Movie Gen 3.3: model averaging)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import CinemeshError
from ..storage.places import Location, location_of
from ..training.checkpoint.alone import write_alone
from ..training.checkpoint.publishing import is_unfinished
from ..training.differences import RECIPE
from ..training.greedy import measuring
from ..training.members import mean_of, read_members, read_shares
from ..training.recipe import read_config
from ..training.resume import CONTENTS
from ..training.sample import FRAME_RATE
from ..training.validation import WEIGHTS
from ..written import wrote

AVERAGED = "averaged"  # of a checkpoint's note: its members, with their shares


def run(
    *,
    members: Sequence[str | Location],
    shares: str | None,
    out: str | Location,
    config: Path | None,
    greedy: bool,
    overrides: Sequence[str],
) -> None:
    """Write the average to ``out``, a folder that is not there yet.

    ``shares``: ``0.5,0.3,0.2``, by default equal. With a recipe the held-out loss of each member and of the average is
    told; ``greedy`` takes the best member, then each next one that does not raise the loss of the equal average.
    Raises CinemeshError for members of different models, shares that are none, and as reading and writing do.
    """
    target = location_of(out)
    if target.exists() and not is_unfinished(target):
        raise CinemeshError(f"--out {out} exists", remedy="name a new folder")
    if greedy and (config is None or shares is not None):
        raise CinemeshError(
            "--greedy " + ("needs a held-out loss" if config is None else f"and --weights {shares} both choose shares"),
            remedy="add --config RECIPE" if config is None else "leave one of them out",
        )
    if overrides and config is None:
        raise CinemeshError("--set replaces a value of a recipe, and there is none", remedy="add --config RECIPE")
    found, model = read_members([*map(location_of, members)])
    given = read_shares(shares, len(found))
    if config is not None:
        with measuring(read_config(config, overrides), found) as measured:
            if greedy:
                found = measured.greedy(found)
                given = read_shares(None, len(found))
            else:
                measured.all(found, given)
    held = [state for state in WEIGHTS if all(state in member.found.states for member in found)]
    first = found[0].found
    note = {key: first.note[key] for key in (RECIPE, CONTENTS, FRAME_RATE) if key in first.note}
    note[AVERAGED] = [
        {
            "checkpoint": str(member.path),
            "share": share,
            "digests": {state: member.found.digests[state] for state in held},
        }
        for member, share in zip(found, given, strict=True)
    ]
    write_alone(
        target,
        model,
        {state: first.states[state] for state in held},
        mean_of(found, given),
        step=max(member.found.step for member in found),
        updates=max(member.found.updates for member in found),
        note=note,
    )
    wrote(
        target,
        f"cinemesh sample CONFIG --checkpoint {target} --prompt ...",
        f"{', '.join(held)} of {len(found)} members",
    )
