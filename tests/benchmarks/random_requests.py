"""Random runs of ``cinemesh plan``: what a person may ask, sensible or not, ends with 0 or 2, soon.

    python tests/benchmarks/random_requests.py [--runs 2000] [--first 0] [--tune] [--explain] [--out FILE]

A request follows from its number alone. Exit code 1 where one ends otherwise, or takes more CPU seconds than
``LIMITS_S``; the result lists these requests and the slowest ones.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import platform
import random
import sys
import time
import traceback
from datetime import date
from pathlib import Path
from unittest.mock import patch

from cinemesh.launch import cli

MODELS = ("movie-gen-30b", "movie-gen-30b", "movie-gen-5b", "movie-gen-upsampler-7b", "tiny", "tiny-video")
OWN_MODELS = sorted((Path(__file__).parent / "models").glob("*.yaml"))  # of numbers that no preset has
CLUSTERS = ("grand-teton-h100", "dgx-h100-ib400", "h200-ib400", "dgx-a100-hdr200", "h100-hbm2e-500w", "local-cpu")
GPUS = (1, 2, 3, 4, 6, 7, 8, 12, 16, 24, 32, 64, 96, 250, 257, 512, 1000, 1024, 1025, 1536, 2048, 4096, 6136, 6144)
BATCHES = (1, 2, 7, 64, 255, 256, 257, 512, 768, 1024, 1537, 2048, 3072, 6144, 8191)
FIELDS = {  # of a plan, by hand; degrees more often than the rest
    "tp": (1, 2, 3, 4, 8, 16),
    "cp": (1, 2, 3, 4, 8, 12),
    "dp_shard": (1, 2, 3, 8, 96, 768, 1536),
    "dp_replicate": (1, 2, 5, 16),
    "recompute": ("none", "selective", "full", "o:lse"),
    "micro_batches": (1, 2, 5),
    "prefetch": (0, 1, 2),
    "grad_units": (2, 3),
    "kv_slices": (2,),
    "kv_chunks": (2,),
    "kv_first": ("true",),
    "tp_slices": (2,),
    "fused_tp": ("true",),
    "defer_weight_gradients": ("true",),
    "recompute_last": ("none",),
    "last_blocks": (1,),
    "sm_margin": (8,),
    "unit_ctas": (4,),
    "normal_priority": ("unit",),
    "order": ("cp:tp:dp_shard:dp_replicate", "dp_shard:dp_replicate:cp:tp"),
}
OPTIONS: tuple[tuple[str, tuple[object, ...], float], ...] = (  # with how often each is given
    ("--packages", ("fa2", "fa3", "fa2,fa3", "apex"), 0.1),
    ("--headroom", (0, 2.5, 40), 0.1),
    ("--servers", (1, 3, 33, 1000), 0.1),
    ("--top", (1, 20), 0.1),
)
LIMITS_S = {(): 5.0, ("--tune",): 10.0, ("--explain",): 10.0, ("--tune", "--explain"): 20.0}  # by what else is asked
SLOWEST = 10  # requests listed
OFTEN = ("tp", "cp", "dp_shard", "dp_replicate", "recompute")


def arguments(seed: int) -> list[str]:
    """The request of a number."""
    draw = random.Random(seed)
    cluster = draw.choice(CLUSTERS)
    gpus = draw.choice(GPUS[:8] if cluster == "local-cpu" else GPUS)
    model = draw.choice((*MODELS, str(draw.choice(OWN_MODELS))))
    asked = ["plan", "--gpus", str(gpus), "--model", model, "--cluster", cluster]
    if draw.random() < 0.7:
        for _ in range(draw.choice((1, 1, 1, 2))):
            sides = (draw.choice((4, 6, 8, 16, 30, 32, 44, 96)) for _ in range(2))
            latent = draw.choice((1, 2, 3, 4, 8, 14, 16, 32)), *sides
            asked += ["--latent", "x".join(map(str, latent)) + draw.choice(("", ":0.3"))]
    which = draw.random()
    if which < 0.35:
        asked += ["--global-batch", str(draw.choice(BATCHES))]
    elif which < 0.6:
        asked += ["--samples", str(draw.choice((1, 2, 3, 4, 6, 8, 16, 32)))]
    fixed = [
        f"{name}={draw.choice(values)}"
        for name, values in FIELDS.items()
        if draw.random() < (0.12 if name in OFTEN else 0.03)
    ]
    if fixed:
        asked += ["--fix", ",".join(fixed)]
    asked += ["--dtype", draw.choice(("bf16", "bf16", "bf16", "float32", "float64"))]
    for option, values, often in OPTIONS:
        if draw.random() < often:
            asked += [option, str(draw.choice(values))]
    for flag, often in (("--encoders", 0.15), ("--json", 0.5)):
        if draw.random() < often:
            asked.append(flag)
    return asked


def run(asked: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line. What is no ``CinemeshError`` comes through: a bug."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    quiet = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with patch.object(sys, "argv", ["cinemesh", *asked]), quiet[0], quiet[1]:
        try:
            cli.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, out.getvalue(), err.getvalue()


def _told(asked: list[str]) -> str:
    """The request, without the folder that models of one's own lie in."""
    return " ".join(asked).replace(f"{OWN_MODELS[0].parent}/", "")


def measure(first: int, runs: int, flags: tuple[str, ...]) -> dict[str, object]:
    """Run requests ``first`` to ``first + runs`` with some flags more."""
    limit_s, codes = LIMITS_S[flags], {0: 0, 2: 0}
    broken: list[dict[str, object]] = []
    taken: list[tuple[float, str]] = []
    for seed in range(first, first + runs):
        asked, begun = [*arguments(seed), *flags], time.process_time()
        try:
            code = run(asked)[0]
        except Exception:  # noqa: BLE001  any that comes through is what is looked for
            code, why = 1, traceback.format_exc(limit=-1)
            broken.append({"seed": seed, "asked": _told(asked), "error": why})
        codes[code] = codes.get(code, 0) + 1
        taken.append((time.process_time() - begun, _told(asked)))
        gc.collect()
    taken.sort(reverse=True)
    return {
        "date": date.today().isoformat(),
        "machine": "2-core x86-64, no GPU",
        "python": platform.python_version(),
        "first": first,
        "runs": runs,
        "flags": list(flags),
        "exit_codes": codes,
        "tracebacks": broken,
        "limit_cpu_s": limit_s,
        "over_limit": sum(seconds > limit_s for seconds, _ in taken),
        "mean_cpu_s": sum(seconds for seconds, _ in taken) / runs,
        "slowest": [{"cpu_s": round(seconds, 2), "asked": asked} for seconds, asked in taken[:SLOWEST]],
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=2000)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--tune", action="store_true")
    options.add_argument("--explain", action="store_true")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    flags = tuple(name for name in ("--tune", "--explain") if getattr(given, name[2:]))
    found = measure(given.first, given.runs, flags)
    text = json.dumps(found, indent=1)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")
    sys.exit(1 if found["tracebacks"] or found["over_limit"] else 0)


if __name__ == "__main__":
    main()
