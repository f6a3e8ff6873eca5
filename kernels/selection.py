"""Which implementation of an op runs, why the others do not, and overrides (torch-free).

An override comes from a recipe or from the variable CINEMESH_KERNELS: ``attention=triton,adamw=reference``; ``all=...``
holds for every op that the package offers. One that cannot be met is an error, never a silent fallback.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import CinemeshError, did_you_mean
from .catalogue import PACKAGES, Implementation, candidates, refusal, share
from .ops import OPS
from .packages import interpreter as interpreting
from .signature import Sizes
from .tuning import DEFAULT_DEVICE

OVERRIDE_VARIABLE = "CINEMESH_KERNELS"
EVERY_OP = "all"


@dataclass(frozen=True)
class Choice:
    """``entry`` runs; ``others``: every other implementation and why it does not."""

    entry: Implementation
    others: tuple[tuple[Implementation, str], ...]


def select(
    op: str,
    device: str,
    *,
    dtype: str | None = None,
    sizes: Sizes | None = None,
    missing: Mapping[str, str],
    override: str | None = None,
    interpreter: bool | None = None,
    tuned: str = DEFAULT_DEVICE,
) -> Choice:
    """The implementation of ``op`` on ``device``, or the override's. Arguments as in ``catalogue.choose``."""
    interpreted = interpreting() if interpreter is None else interpreter
    usable: list[Implementation] = []
    others: list[tuple[Implementation, str]] = []
    for entry in candidates(op):
        reason = refusal(entry, device, dtype=dtype, sizes=sizes, missing=missing, interpreter=interpreted)
        if reason is None and device == "cpu" and "cpu" not in entry.devices and override != entry.package:
            reason = "Triton's interpreter proves kernels, far too slowly to train; an override asks for it"
        if reason is None:
            usable.append(entry)
        else:
            others.append((entry, reason))
    if override is not None:
        best = next((entry for entry in usable if entry.package == override), None)
        if best is None:
            raise _unmet(op, override, device, others, usable)
        why = f"overridden by {op}={override}"
        others += [(entry, why) for entry in usable if entry is not best]
    else:
        best = usable[0] if device == "cpu" else max(usable, key=lambda entry: share(entry, tuned))
        others += [(entry, _slower(entry, best, device, tuned)) for entry in usable if entry is not best]
    others.sort(key=lambda pair: PACKAGES.index(pair[0].package))
    return Choice(best, tuple(others))


def _slower(entry: Implementation, best: Implementation, device: str, tuned: str) -> str:
    rated, better = share(entry, tuned), share(best, tuned)
    if device == "cpu" or rated == better:
        return f"{best.package} comes first"
    return f"rate class {entry.rate_class} ({rated:.2f}) is below {best.rate_class} ({better:.2f})"


def _unmet(
    op: str,
    package: str,
    device: str,
    others: Sequence[tuple[Implementation, str]],
    usable: Sequence[Implementation],
) -> CinemeshError:
    # Several entries of a package serve different devices: the reason of one for this kind of device says more.
    kind = "cpu" if device == "cpu" else "cuda"
    reasons = [(kind in entry.devices, reason) for entry, reason in others if entry.package == package]
    reason = max(reasons, key=lambda pair: pair[0], default=(False, f"{package} has no {op}"))[1]
    known = ", ".join(dict.fromkeys(entry.package for entry in usable))
    return CinemeshError(f"kernel override {op}={package} on {device}: {reason}. Usable there: {known}")


# -- overrides --------------------------------------------------------------------------------------------------------


def overrides(of_recipe: Mapping[str, str] | None = None) -> dict[str, str]:
    """Op (or ``all``) -> package: the recipe's, then those of the environment, which win; checked by name."""
    wanted = {**(of_recipe or {}), **parse_overrides(os.environ.get(OVERRIDE_VARIABLE, ""))}
    for op, package in wanted.items():
        said = f"kernel override {op}={package}"
        if op != EVERY_OP and op not in OPS:
            raise CinemeshError(f"{said}: unknown op {op!r}", remedy=did_you_mean(op, (*OPS, EVERY_OP)))
        if package not in PACKAGES:
            raise CinemeshError(f"{said}: unknown package {package!r}", remedy=did_you_mean(package, PACKAGES))
        offered = PACKAGES if op == EVERY_OP else tuple(dict.fromkeys(entry.package for entry in candidates(op)))
        if package not in offered:
            raise CinemeshError(f"{said}: {package} has no {op}", remedy=f"choose one of {', '.join(offered)}")
    return wanted


def override_of(op: str, wanted: Mapping[str, str]) -> str | None:
    """The override for one op; ``all`` holds for the ops that its package offers."""
    if op in wanted:
        return wanted[op]
    package = wanted.get(EVERY_OP)
    return package if package in {entry.package for entry in candidates(op)} else None


def parse_overrides(text: str) -> dict[str, str]:
    """``attention=triton,adamw=reference`` as a mapping."""
    wanted: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, equals, package = item.partition("=")
        if not equals:
            raise CinemeshError(
                f"{OVERRIDE_VARIABLE}: {item!r} is not op=package",
                remedy="write for example attention=triton,adamw=reference",
            )
        wanted[op.strip()] = package.strip()
    return wanted
