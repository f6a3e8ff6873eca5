"""Checkpoints of the chain, early against late, through ``judge make``, the page's server and ``judge score``.

    python tests/benchmarks/chain_against_scratch.py --seeds 0 --work runs/chain-benchmark
    python tests/benchmarks/judged_checkpoints.py runs/chain-benchmark/seed-0/chain.yaml [--work DIR] [--json FILE]

NOBODY HAS LOOKED at these clips. The raters are three programs, named so: each sees what a person is shown, two files
and a prompt without a system's name, and answers over the page's own door. They know how the prompt's scene looks: they
prefer the clip that is nearer to a training clip of it, by PSNR, by SSIM, and by PSNR of how it changes from frame to
frame; clips that are as near (to 0.1 dB, to 0.002) are a tie. So the table says how far checkpoints have learnt their
scenes, and that the way from clips to the table works; it says nothing of what people prefer.

Systems are checkpoints of the stage of 128 px, early to late, and the average of the two finetunings, the chain's end.
The validation losses that the stage's checkpoints have are drawn against net wins (Movie Gen, Fig. 15).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import yaml
from torch import Tensor

from cinemesh.data.scenes import read_captions
from cinemesh.data.video import read_frames
from cinemesh.evaluation.blinding import CLIPS, read_pairs
from cinemesh.evaluation.clip_files import content_digest
from cinemesh.evaluation.reconstruction import psnr, ssim
from cinemesh.evaluation.serving import JudgeServer
from cinemesh.evaluation.votes import VOTES_FILE, Answer, read_key
from cinemesh.launch.cluster.processes import joined
from cinemesh.launch.training.chain import Link, read_chain
from cinemesh.launch.training.checkpoint.manifest import read_manifest, step_folder
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.plateau import VALIDATIONS
from cinemesh.launch.training.setting import Setting

STAGE, MEAN = "t2iv-128", "mean"
STEPS = (50, 100, 200)
SAMPLED_STEPS = 25
AXIS = "overall"
VARIANTS: dict[str, Callable[[str], str]] = {  # a prompt counts once: other words, the same scene
    "caption": lambda text: text,
    "lower": lambda text: text.lower().rstrip("."),
}
TIES = {"psnr-program": 0.1, "ssim-program": 0.002, "motion-program": 0.1}


def changes(clip: Tensor) -> Tensor:
    """From frame to frame, around grey."""
    return (128 + (clip[1:].int() - clip[:-1].int()) // 2).to(torch.uint8)


NEARNESS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "psnr-program": psnr,
    "ssim-program": ssim,
    "motion-program": lambda a, b: psnr(changes(a), changes(b)),
}


def cinemesh(*words: object) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "cinemesh.launch", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def sampled(folder: Path, checkpoint: Path, link: Link, prompts: Path) -> None:
    """A clip of every prompt, on one process."""
    given = [word for override in link.overrides for word in ("--set", override)]
    where = ("--prompts", prompts, "--checkpoint", checkpoint, "--out", folder)
    cinemesh("sample", link.recipe, *given, "--steps", SAMPLED_STEPS, *where)


def shown_scenes(link: Link) -> dict[str, list[Tensor]]:
    """Decoded training clips of every scene."""
    setting = Setting.of(link.config())
    one = setting.under(setting.config.plan.with_degrees(tp=1, cp=1, dp_shard=1, dp_replicate=1))
    with joined(one.config.plan, "cpu") as place:
        cache = open_history(one, place).at(one.config.schedule.steps)
    windows = next(of.train for of in cache.buckets if of.bucket == str(setting.config.sampled))
    scenes: dict[str, list[Tensor]] = {}
    for window in (windows[index] for index in range(0, len(windows), 8)):
        clip = setting.encoding.codec.decode(window.latent)[: setting.config.sampled.frames]
        scenes.setdefault(window.scene, []).append(clip)
    return scenes


def votes(folder: Path, scenes: dict[str, list[Tensor]], scene_of: dict[str, str]) -> None:
    """Of every program, posted to the page's server as a browser does."""
    pairs = read_pairs(folder).pairs
    server = JudgeServer(folder, 0)
    served = threading.Thread(target=server.serve_forever, daemon=True)
    served.start()
    near: dict[str, dict[str, float]] = {}  # by a file's bytes: a clip stands in several pairs
    try:
        for pair in pairs:
            known = scenes[scene_of[pair.prompt]]
            sides = []
            for name in (pair.left, pair.right):
                digest = content_digest(folder / CLIPS / name)
                if digest not in near:
                    clip = read_frames(folder / CLIPS / name, *known[0].shape[1:3])[: len(known[0])]
                    near[digest] = {by: max(measure(clip, of) for of in known) for by, measure in NEARNESS.items()}
                sides.append(near[digest])
            for rater, tie in TIES.items():
                left, right = (side[rater] for side in sides)
                answer = Answer.TIE if abs(left - right) < tie else Answer.LEFT if left > right else Answer.RIGHT
                vote = {"pair": pair.name, "rater": rater, "axis": AXIS, "answer": answer}
                request = urllib.request.Request(
                    f"{server.address}vote",
                    json.dumps(vote).encode(),
                    {"Content-Type": "application/json"},
                )
                with urllib.request.urlopen(request) as reply:
                    assert json.load(reply) == {"saved": True}
    finally:
        server.shutdown()
        server.server_close()
        served.join()


def losses(checkpoints: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Held-out loss and standard error of each that was validated when it was written; the average was not."""
    found: dict[str, dict[str, float]] = {}
    for name, path in checkpoints.items():
        manifest = read_manifest(path)
        for step, loss, error in manifest.note.get(VALIDATIONS, []):
            if step == manifest.step and name != MEAN:
                found[name] = {"loss": loss, "standard_error": error}
    return found


def main() -> None:
    """From checkpoints to the table; print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/judged-checkpoints"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    work, begun, used = asked.work, time.monotonic(), time.process_time()
    links = {link.stage.name: link for link in read_chain(asked.chain)}
    stage = links[STAGE]
    kept = Path(stage.config().logging.directory) / "checkpoints"
    checkpoints = {f"step-{step}": Path(str(step_folder(kept, step))) for step in STEPS}
    checkpoints["mean"] = Path(str(links[MEAN].end()))

    scenes = read_captions(stage.config().data.captions)
    rows = [
        {"name": f"{scene.name}-{variant}", "prompt": word(scene.caption), "concept": scene.name, "motion": "medium"}
        for scene in scenes
        for variant, word in VARIANTS.items()
    ]
    work.mkdir(parents=True, exist_ok=True)
    prompts = work / "prompts.yaml"
    prompts.write_text(yaml.safe_dump(rows, sort_keys=False), encoding="utf-8")
    for name, checkpoint in checkpoints.items():
        sampled(work / name, checkpoint, links["clip"], prompts)
    folder = work / "judged"
    shutil.rmtree(folder, ignore_errors=True)
    cinemesh(
        "judge", "make", *(work / name for name in checkpoints), "--prompts", prompts, "--axis", AXIS, "--out", folder
    )
    scene_of = {row["prompt"]: row["name"].rpartition("-")[0] for row in rows}
    votes(folder, shown_scenes(stage), scene_of)
    held = losses(checkpoints)
    given = [word for name, of in held.items() for word in ("--loss", f"{name}={of['loss']:.4f}")]
    drawn = ("--plot", asked.picture) if asked.picture else ()
    table = json.loads(cinemesh("judge", "score", folder / VOTES_FILE, *given, *drawn, "--json"))
    (against,) = table["against_loss"]
    told = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "torch": torch.__version__,
        "raters": "THREE PROGRAMS, no person: " + ", ".join(TIES),
        "prompts": len(rows),
        "pairs": len(read_key(folder / "key.json").pairs),
        "wall_s": round(time.monotonic() - begun),
        "cpu_s_without_sampling": round(time.process_time() - used),
        "validation_losses": held,
        "early_against_late": next(
            row["net"] | {"first": row["first"], "second": row["second"]}
            for row in table["comparisons"]
            if {row["first"], row["second"]} == {f"step-{STEPS[0]}", MEAN}
        ),
        "against_loss": against,
        "comparisons": [
            {key: row[key] for key in ("axis", "first", "second", "votes", "agreement", "net")}
            for row in table["comparisons"]
        ],
        "ratings": table["ratings"],
        "raters_audited": table["raters"],
    }
    print(json.dumps(told, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
