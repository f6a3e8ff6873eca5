"""The one file of an acceptance run, as ``cinemesh calibrate`` and ``cinemesh validate`` read it (torch-free).

``launch/acceptance`` writes it. Here are the names of what they take from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..documents import mapping, quoted, read_json
from ..errors import CinemeshError
from ..parallel.ir.collectives import COLLECTIVES
from ..parallel.ir.fields import MOST_RANKS
from ..ranges import Range, integers, reals

ACCEPTANCE_FILE = "acceptance.json"
STAGE_ROWS, NAME, FOUND, DEVICE, DATE = (
    "stages",
    "name",
    "found",
    "device",
    "date",
)  # keys of the file and of its stages
LINKS, PREDICTIONS = "links", "predictions"  # stages
TESTS, CAPTURED = "tests", "captured"  # of the links: collectives issued one by one, and replayed in a CUDA Graph
STEP_ROWS = "rows"  # of the predictions: what ``validate`` predicts
_REMEDY = f"give the {ACCEPTANCE_FILE} that python -m cinemesh.launch.acceptance wrote"
RANKS_RANGE = integers(1, MOST_RANKS, "no cluster has more")
TIME_RANGE = reals(0.0, 1e6, "no collective takes longer", "s", above=True)
BYTES_RANGE = integers(1, 2**50, "no collective moves more", "bytes")
_TEST = ("origin", "kind", "ranks", "servers", "seconds")


def read_acceptance(path: Path) -> dict[str, Any]:
    """The file. Raises CinemeshError for one that is none."""
    values = read_json(path, "the acceptance file", _REMEDY)
    if not isinstance(values, dict) or not isinstance(values.get(STAGE_ROWS), list):
        raise CinemeshError(f"the acceptance file {path} holds no list of {STAGE_ROWS}", remedy=_REMEDY)
    return values


def found_in(values: Mapping[str, Any], stage: str, path: Path) -> dict[str, Any]:
    """What a stage found. Raises CinemeshError where it did not run."""
    for one in values[STAGE_ROWS]:
        if isinstance(one, dict) and one.get(NAME) == stage and isinstance(one.get(FOUND), dict) and one[FOUND]:
            return one[FOUND]
    raise CinemeshError(
        f"the acceptance file {path}: stage {stage} found nothing", remedy=f"run it again with --only {stage}"
    )


def rows_of(path: Path) -> Any:
    """The rows that ``validate`` predicts, as a rows file would hold them."""
    return found_in(read_acceptance(path), PREDICTIONS, path).get(STEP_ROWS)


def link_times(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The times of collectives, those in a graph where there are any, as steps are captured; and the day, ISO.

    Each has ``kind``, ``ranks``, ``servers`` and ``seconds`` by bytes. Raises CinemeshError for times that are wrong,
    and for those of CPU processes.
    """
    values = read_acceptance(path)
    where, device = f"the acceptance file {path}", values.get(DEVICE)
    if device != "cuda":
        raise CinemeshError(
            f"{where} is of {quoted(device)}, and links are between GPUs",
            remedy="on CPUs, cinemesh calibrate measures this machine by itself",
        )
    found = found_in(values, LINKS, path)
    tests = found.get(CAPTURED) or found.get(TESTS)
    if not isinstance(tests, list) or not tests or not isinstance(values.get(DATE), str):
        raise CinemeshError(f"{where}: {LINKS} holds no times of a known day", remedy=_REMEDY)
    return [_test(test, f"{where}: {LINKS} {number}") for number, test in enumerate(tests, 1)], values[DATE]


def _test(value: Any, where: str) -> dict[str, Any]:
    test = mapping(value, where, _TEST, required=_TEST, remedy=_REMEDY)
    if test["kind"] not in COLLECTIVES or not isinstance(test["seconds"], dict):
        raise CinemeshError(f"{where}: kind is {quoted(test['kind'])}", remedy=_REMEDY)
    for name in ("ranks", "servers"):
        _check(f"{where}: {name}", RANKS_RANGE, test[name])
    if test["ranks"] < 2 or test["ranks"] % test["servers"]:
        raise CinemeshError(
            f"{where}: {test['ranks']} ranks on {test['servers']} servers", remedy="as many lie on every server"
        )
    seconds: dict[int, float] = {}
    for size, time_s in test["seconds"].items():
        number = int(size) if size.isdecimal() and len(size) < 20 else size
        _check(f"{where}: bytes", BYTES_RANGE, number)
        _check(f"{where}: seconds of {size} bytes", TIME_RANGE, time_s)
        seconds[int(number)] = time_s
    return test | {"seconds": seconds}


def _check(what: str, allowed: Range, value: object) -> None:
    if must := allowed.wrong(value):
        raise CinemeshError(f"{what} is {quoted(value)}", remedy=must)
