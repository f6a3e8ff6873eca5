"""What a stage of ``first_gpu.py`` is given, and how it notes what it finds (torch-free).

A stage is a module with ``run(here)``. It runs in a process of its own, which is killed at the stage's deadline: what
was noted by then stays.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cinemesh.files import atomic_file
from cinemesh.kernels.tuning import device_key
from cinemesh.perf_model.calibration import card as card_file
from cinemesh.perf_model.clusters.cards import base_of
from cinemesh.perf_model.clusters.cluster import Cluster, load

KERNELS_FILE = "card.json"  # of stage 4, as ``calibrate --card`` reads it
CLUSTER_FILE = "card.yaml"  # made of it


@dataclass
class Here:
    """Where a stage runs.

    place    of tensors: ``cuda`` or, where CUDA is pretended, ``cpu``
    smoke    whether it is: shapes are tiny, and no number is a measurement
    until    the moment of ``time.monotonic`` at which the process is killed
    folder   of the whole run: what a stage writes there, later ones read
    file     of this stage's findings, written anew by every ``note``
    """

    place: str
    smoke: bool
    until: float
    folder: Path
    file: Path
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()

    def note(self, **values: Any) -> None:
        """What was found so far stands in the file, whatever happens next."""
        self.found |= values
        with atomic_file(self.file) as unfinished:
            unfinished.write_text(json.dumps(self.found, indent=1))

    def beside(self, what: str, predicted: Mapping[str, float | None], measured: Mapping[str, float | None]) -> None:
        """Both under the same names; what a smoke run took is called so."""
        assert predicted.keys() == measured.keys(), (what, [*predicted], [*measured])
        ran = "smoke" if self.smoke else "measured"
        self.note(**{what: {"predicted": dict(predicted), ran: dict(measured)}})


def cluster_of(here: Here, card: str) -> Cluster:
    """What prices a step on this card: made of stage 4's rates, or the shipped one where there are none yet."""
    measured, base = here.folder / KERNELS_FILE, base_of(device_key(card))
    if here.smoke or not measured.exists():
        return load(base)
    return card_file.write(measured, base, here.folder / CLUSTER_FILE)
