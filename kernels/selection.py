"""Which implementation of an op runs, why the others do not, and overrides (torch-free).

An override comes from a recipe or from the variable CINEMESH_KERNELS: ``attention=triton,adamw=reference``; ``all=...``
holds for every op that the package offers. One that cannot be met is an error, never a silent fallback.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import CinemeshError, did_you_mean
from .catalogue import NOT_ASSUMED, OPTIONAL, PACKAGES, Implementation, candidates, refusal, share
from .ops import OPS
from .packages import interpreter as interpreting
from .packages import missing
from .signature import Sizes
from .tuning import DEFAULT_DEVICE

OVERRIDE_VARIABLE = "CINEMESH_KERNELS"
EVERY_OP = "all"


@dataclass(frozen=True)
class Software:
    """What a choice depends on besides the call and the device; by default a plain install of torch and Triton.

    ``missing``: package -> why it cannot be used. ``overrides``: op, or ``all``, -> package. ``deterministic``: only
    kernels that sum in one fixed order.
    """

    missing: Mapping[str, str] = field(default_factory=lambda: NOT_ASSUMED)
    overrides: Mapping[str, str] = field(default_factory=dict)
    deterministic: bool = False

    @classmethod
    def here(cls, of_recipe: Mapping[str, str] | None = None, deterministic: bool = False) -> Software:
        """What is installed on this machine, under overrides. Raises CinemeshError for one that names nothing."""
        return cls(missing(), overrides(of_recipe), deterministic)

    @classmethod
    def planned(cls, of_recipe: Mapping[str, str] | None = None, deterministic: bool = False) -> Software:
        """As ``here``, torch and Triton taken for granted: who plans may have neither. Raises as ``here``."""
        return cls.here(of_recipe, deterministic).beside(("torch", "triton", "reference"))

    def beside(self, packages: Iterable[str]) -> Software:
        """The same with more packages installed."""
        more = set(packages)
        return replace(self, missing={name: why for name, why in self.missing.items() if name not in more})

    @property
    def packages(self) -> tuple[str, ...]:
        """Those beside a plain install."""
        return tuple(name for name in OPTIONAL if name not in self.missing)


@dataclass(frozen=True)
class Choice:
    """``entry`` runs; ``others``: every other implementation and why it does not."""

    entry: Implementation
    others: tuple[tuple[Implementation, str], ...]


PLAIN_INSTALL = Software()


def select(
    op: str,
    device: str,
    software: Software = PLAIN_INSTALL,
    *,
    dtype: str | None = None,
    sizes: Sizes | None = None,
    interpreter: bool | None = None,
    tuned: str = DEFAULT_DEVICE,
) -> Choice:
    """What runs ``op`` on ``device`` (``cpu``, ``cuda`` or ``sm_90``): the override's, or the usable one of best rate.

    ``dtype`` is that of the activations, ``sizes`` maps labels of the op table to local sizes, ``tuned`` the card whose
    tuning table is read. Raises CinemeshError for an override that cannot be met.
    """
    interpreted = interpreting() if interpreter is None else interpreter
    override, ordered = override_of(op, software.overrides), software.deterministic
    given = {"dtype": dtype, "sizes": sizes, "missing": software.missing, "interpreter": interpreted}
    usable: list[Implementation] = []
    others: list[tuple[Implementation, str]] = []
    for entry in candidates(op):
        reason = refusal(entry, device, deterministic=ordered, **given)
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
    elif device == "cpu":
        best = usable[0]
        others += [(entry, f"{best.package} comes first") for entry in usable if entry is not best]
    else:
        rated = {entry.package: share(entry, device, ordered, tuned) for entry in usable}
        best = max(usable, key=lambda entry: rated[entry.package])
        others += [(entry, _slower(entry, best, rated)) for entry in usable if entry is not best]
    others.sort(key=lambda pair: PACKAGES.index(pair[0].package))
    return Choice(best, tuple(others))


def _slower(entry: Implementation, best: Implementation, rated: Mapping[str, float]) -> str:
    own, better = rated[entry.package], rated[best.package]
    if own == better:
        return f"{best.package} comes first"
    return f"rate class {entry.rate_class} ({own:.2f}) is below {best.rate_class} ({better:.2f})"


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


# -- packages and overrides --------------------------------------------------------------------------------------------


def packages_of(names: Iterable[str]) -> tuple[str, ...]:
    """Optional packages by name, or by that of their attention (``fa3``). Raises CinemeshError for any other."""
    known = {entry.rate_class: entry.package for entry in candidates("attention") if entry.package in OPTIONAL}
    known |= {name: name for name in OPTIONAL}
    found: dict[str, None] = {}
    for name in names:
        if name not in known:
            raise CinemeshError(
                f"package {name!r} is none beside torch and Triton, which are there",
                remedy=did_you_mean(name, known),
            )
        found[known[name]] = None
    return tuple(found)


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
