"""Ten thousand wrong inputs at every door: ``python tests/benchmarks/fuzz_doors.py [CASES] [SEED]``.

Writes ``results/fuzz_doors.json``: cases and exit codes by door, what was not answered as promised, seconds, and the
most memory that the process ever held.
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
MACHINE = "2-core x86-64, no GPU"


def main(cases: int, seed: int) -> None:
    warnings.simplefilter("ignore")
    each, doors = -(-cases // len(DOORS)), dict[str, Any]()
    for name in DOORS:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            codes, wrong = knock_often(name, each, seed, Path(folder))
        doors[name] = {
            "cases": codes.total(),
            "exit_codes": {str(code): count for code, count in sorted(codes.items())},
            "not_as_promised": [f"{given!r:.300}: {how[-300:]}" for given, how in wrong],
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
