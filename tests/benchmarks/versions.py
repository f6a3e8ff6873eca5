"""Another Python, torch and Triton: an environment of its own, and the tests there that such a change can break.

    python tests/benchmarks/versions.py --python python3.12 --torch 2.11.0 --triton 3.6.0 --beside numpy==2.3.5 \
        [--env DIR] [--out FILE]

Makes a virtual environment (kept in ``--env``, else gone at the end), installs cinemesh beside that torch and runs
``SUITE``: parity, the ledger, frozen replay, checkpoints, Triton's kernels under its interpreter and their compilation
for sm_90. Prints what pytest says, and the versions. Exit code 1 where a test fails, or where torch was replaced.

CUDA builds of torch import without a GPU; they take gigabytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUITE = (
    "tests/model/test_parity.py",
    "tests/model/test_step_on_triton.py",
    "tests/parallel/runtime",
    "tests/launch/training/test_checkpoint.py",
    "tests/launch/training/test_loop.py",
    "tests/kernels",
)
TOLD = (
    "import json, platform, torch, triton; "
    "print(json.dumps([platform.python_version(), torch.__version__, triton.__version__]))"
)


def call(*command: str | Path) -> str:
    """What a command printed. Its own errors are shown; it ends the run where it fails."""
    done = subprocess.run([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def measure(env: Path, python: str, torch: str, triton: str | None, beside: list[str]) -> dict[str, object]:
    """Make the environment if it is not there, and run the suite in it."""
    inside = env / "bin" / "python"
    if not inside.exists():
        call(python, "-m", "venv", env)
    brought = [f"torch=={torch}", *([f"triton=={triton}"] if triton else []), *beside]
    call(inside, "-m", "pip", "install", "--quiet", *brought)
    before = json.loads(call(inside, "-c", TOLD))
    call(inside, "-m", "pip", "install", "--quiet", *beside, "--editable", ".[dev]")
    after = json.loads(call(inside, "-c", TOLD))
    begun = time.monotonic()
    tests = subprocess.run(
        [str(inside), "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITE],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(tests.stdout)
    lines = tests.stdout.strip().splitlines()
    return {
        "date": date.today().isoformat(),
        "machine": f"2-core {platform.machine()}, no GPU",
        "python": after[0],
        "torch": after[1],
        "triton": after[2],
        "beside": beside,
        "replaced_by_the_install": before != after,
        "suite": list(SUITE),
        "exit_code": tests.returncode,
        "said": lines[-1] if lines else "",
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "seconds": round(time.monotonic() - begun),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--python", default=sys.executable)
    options.add_argument("--torch", required=True)
    options.add_argument("--triton", help="by default the one that torch brings")
    options.add_argument("--beside", action="append", default=[], help="another requirement of the environment")
    options.add_argument("--env", type=Path)
    options.add_argument("--out", type=Path, help="a list of runs, to which this one is added")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.env or Path(folder) / "env", given.python, given.torch, given.triton, given.beside)
    print(json.dumps(found, indent=1))
    if given.out is not None:
        others = json.loads(given.out.read_text()) if given.out.exists() else []
        same = ("python", "torch", "triton", "beside")
        others = [run for run in others if any(run[name] != found[name] for name in same)]
        given.out.write_text(json.dumps([*others, found], indent=1) + "\n")
    sys.exit(1 if found["exit_code"] or found["replaced_by_the_install"] else 0)


if __name__ == "__main__":
    main()
