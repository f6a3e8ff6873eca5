"""Thousands of wrong inputs at every door: ``python tests/benchmarks/fuzz_doors.py [CASES] [SEED]``.

Writes ``results/fuzz_doors.json``: cases and exit codes by door, what was not answered as promised, seconds in all and
CPU seconds of the slowest, and the most memory that the process ever held. One above ``LIMIT_S`` is not as promised.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import tempfile
import time
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from doors import DOORS, knock_often

RESULT = Path(__file__).parent / "results" / "fuzz_doors.json"
LIMIT_S = 10.0
MACHINE = "2-core x86-64, no GPU"


def main(cases: int, seed: int) -> None:
    warnings.simplefilter("ignore")
    each, doors = -(-cases // len(DOORS)), dict[str, Any]()
    for name in DOORS:
        begun, slowest = time.perf_counter(), [0.0]
        late: list[tuple[Any, str]] = []

        def spent(given: Any, seconds: float, slowest: list[float] = slowest, late: list[Any] = late) -> None:
            slowest[0] = max(slowest[0], seconds)
            if seconds > LIMIT_S:
                late.append((given, f"{seconds:.1f} s of CPU time"))

        with tempfile.TemporaryDirectory() as folder:
            codes, wrong = knock_often(name, each, seed, Path(folder), spent)
        doors[name] = {
            "cases": codes.total(),
            "exit_codes": {str(code): count for code, count in sorted(codes.items())},
            "not_as_promised": [f"{given!r:.300}: {how[-300:]}" for given, how in [*wrong, *late]],
            "slowest_cpu_s": round(slowest[0], 2),
            "seconds": round(time.perf_counter() - begun, 1),
        }
        print(name, doors[name], flush=True)
    told = {
        "date": date.today().isoformat(),
        "machine": MACHINE,
        "versions": {
            "python": platform.python_version(),
            **{n: version(n) for n in ("hypothesis", "pydantic", "typer")},
        },
        "command": f"python tests/benchmarks/fuzz_doors.py {cases} {seed}",
        "cases": sum(door["cases"] for door in doors.values()),
        "not_as_promised": sum(len(door["not_as_promised"]) for door in doors.values()),
        "most_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "doors": doors,
    }
    RESULT.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    given = [int(value) for value in sys.argv[1:]]
    main(*(given or [10_000, 1]))
