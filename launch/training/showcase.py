"""What a finished run shows: a sampled clip of each scene, beside the training clip that it comes nearest to.

    directory/samples/SCENE.mp4   contact_sheet.png   samples.json

Training clips are decoded from their latents, so the codec's own loss is on both sides of a PSNR.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...data.cache.samples import Cache, Samples
from ...data.clips import write_contact_sheet, write_mp4
from ...data.codec import LatentCodec
from ...evaluation.reconstruction import psnr
from ...files import atomic_file
from ...kernels.philox import Purpose
from ...model.flow import draw_noise
from ...model.runner import StepRunner
from ...parallel.layers.sharded import FROZEN_STATE
from ..cluster.marks import Doing, Marks
from ..cluster.processes import Joined
from .average import remark
from .clip_sampler import ClipSampler
from .setting import Setting

CONTACT_SHEET = "contact_sheet.png"
SCORES = "samples.json"
IMAGES_IN_ROW = 8
WORST = 3  # scenes, as many as a reader looks twice at


@dataclass(frozen=True)
class Score:
    """How near a sampled clip comes to the training clips of its scene; PSNR in dB."""

    scene: str
    psnr_db: float  # to the nearest training clip of the scene
    noise_db: float  # of decoded noise, to the nearest one likewise
    other_scenes_db: float  # to the nearest training clip of any other scene
    nearest_frame: int  # first frame of the nearest training clip, in its video

    def __str__(self) -> str:
        return (
            f"{self.scene}: {self.psnr_db:.1f} dB to the training clip at frame {self.nearest_frame}; decoded noise "
            f"{self.noise_db:.1f} dB, other scenes {self.other_scenes_db:.1f} dB"
        )


def show_samples(setting: Setting, place: Joined, cache: Cache, runner: StepRunner) -> None:
    """Sample clips, write them and print how near they come to what was trained on. Collective."""
    config, bucket, captions = setting.config, setting.config.sampled, setting.sampled_captions(cache)
    weights = runner.buffers[config.weights]
    numbered = dict(enumerate(captions.values()))
    sampler = ClipSampler(
        setting,
        place,
        weights,
        numbered,
        samples=runner.batch.samples,
        beside=runner,
        frozen=runner.buffers.get(FROZEN_STATE),
    )
    clips = [setting.encoding.codec.decode(latent) for _, latent in sampler.latents()]
    if place.rank:
        return
    if said := remark(config, runner.updates_done):
        print(said)
    folder = config.logging.directory / "samples"
    shown = {scene: clip[: bucket.frames] for scene, clip in zip(captions, clips, strict=True)}
    train = next(windows.train for windows in cache.buckets if windows.bucket == str(bucket))
    scores = show(folder, shown, train, setting.encoding.codec, place.marks)
    for score in scores:
        print(score)
    print(reading(scores, setting.encoding.codec))
    print(
        f"clips and {CONTACT_SHEET} are in {folder}; tensorboard --logdir {config.logging.directory} shows the curves"
    )


def reading(scores: Sequence[Score], codec: LatentCodec) -> str:
    """How to read a contact sheet, and why its worst scenes look broken: stands in the picture."""
    worst = sorted(scores, key=lambda score: score.psnr_db)[:WORST]
    return (
        "In each pair a clip that the model made stands above the training clip that it is nearest to. Both went "
        f"through the codec, so where they differ, the model errs. {codec.errors} Farthest from what was learnt, and "
        f"so most broken: {', '.join(f'{score.scene} ({score.psnr_db:.1f} dB)' for score in worst)}; more training, or "
        "a larger model, brings them nearer."
    )


def show(folder: Path, clips: dict[str, Tensor], train: Samples, codec: LatentCodec, marks: Marks) -> list[Score]:
    """Compare sampled ``clips`` (uint8 [T, H, W, 3], by scene) with the training windows; write them and the scores."""
    windows = [train[index] for index in range(len(train))]
    trained = decoded(codec, [window.latent for window in windows], marks)
    zero = torch.zeros(1, dtype=torch.int64)
    scores: list[Score] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for number, (scene, clip) in enumerate(clips.items()):
        own = [index for index, window in enumerate(windows) if window.scene == scene]
        others = [index for index, window in enumerate(windows) if window.scene != scene]
        length = len(clip)  # frames; the last block of a decoded clip may be longer
        nearest = max(own, key=lambda index: psnr(clip, trained[index][:length]))
        noise = draw_noise(0, zero[0], zero + number, zero, windows[0].latent.shape, Purpose.SAMPLING)[0].float()
        drawn = codec.decode(noise)[:length]
        score = Score(
            scene,
            psnr(clip, trained[nearest][:length]),
            max(psnr(drawn, trained[index][:length]) for index in own),
            max((psnr(clip, trained[index][:length]) for index in others), default=0.0),
            windows[nearest].first_frame,
        )
        scores.append(score)
        pairs.append((clip, trained[nearest][:length]))
        write_mp4(folder / f"{scene}.mp4", clip, windows[nearest].frame_rate)
    rows = image_rows if all(len(clip) == 1 for clip in clips.values()) else clip_rows
    write_contact_sheet(folder / CONTACT_SHEET, rows(scores, pairs), reading(scores, codec))
    with atomic_file(folder / SCORES) as part:
        part.write_text(json.dumps([asdict(score) for score in scores], indent=1), encoding="utf-8")
    return scores


def clip_rows(scores: Sequence[Score], pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A row for each clip, above that of the one that it is nearest to."""
    rows: dict[str, Tensor] = {}
    for score, (clip, nearest) in zip(scores, pairs, strict=True):
        rows[f"{score.scene}: sampled, {score.psnr_db:.1f} dB"] = clip
        rows[f"{score.scene}: training clip at frame {score.nearest_frame}"] = nearest
    return rows


def image_rows(scores: Sequence[Score], pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Clips of one frame, so many beside one another, above those that they are nearest to."""
    rows: dict[str, Tensor] = {}
    for start in range(0, len(pairs), IMAGES_IN_ROW):
        told = ", ".join(f"{score.scene} {score.psnr_db:.0f}" for score in scores[start : start + IMAGES_IN_ROW])
        made, nearest = (torch.cat(images) for images in zip(*pairs[start : start + IMAGES_IN_ROW], strict=True))
        rows[f"sampled (dB): {told}"] = made
        rows[f"training images that {start + 1} to {start + len(made)} are nearest to"] = nearest
    return rows


def decoded(codec: LatentCodec, latents: Iterable[Tensor], marks: Marks) -> list[Tensor]:
    """Their clips, one after the other."""
    clips: list[Tensor] = []
    for number, latent in enumerate(latents):
        marks.at(number, Doing.DECODING)
        clips.append(codec.decode(latent))
    return clips
