"""What a run reads of its latent cache: bytes a second beside the storage's, and how often it takes a sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ...data.cache.building import CacheBuild
from ...data.cache.storage import Storage, is_url
from ...data.cache.version import FOLDER, BucketRows, Version
from ...errors import CinemeshError
from ...model.config import latent_text
from ..tables import plain_table
from ..training.recipe import Config
from ..training.setting import Setting
from .reply import BucketReading, BucketStep

VALUE_BYTES = 4  # of a latent or an embedding in a cache: float32
NUMBERS = ("sample", "read", "samples", "epochs")


def bucket_readings(setting: Setting, steps: Sequence[BucketStep]) -> list[BucketReading]:
    """Of every bucket, of whose latents these are the steps; rows where the cache is there. Nothing is decoded."""
    config, data = setting.config, setting.config.data
    step_s = {step.latent: step.step_s for step in steps}
    rows = {of.bucket: of.rows for of in _rows(config, setting)}
    text = sum(VALUE_BYTES * encoder.tokens * encoder.width for encoder in setting.encoding.encoders)
    weights, batches = data.step_weights, setting.global_batches
    readings: list[BucketReading] = []
    for bucket, latent, weight, batch in zip(data.shapes, setting.latents, weights, batches, strict=True):
        t, h, w = latent
        sample = VALUE_BYTES * setting.encoding.codec.channels * t * h * w + text
        taken = config.schedule.steps * weight / sum(weights) * batch
        known = rows.get(str(bucket))
        readings.append(
            BucketReading(
                bucket=str(bucket),
                sample_bytes=sample,
                bytes_per_s=sample * batch / step_s[latent_text(latent)],
                samples=round(taken),
                rows=known,
                epochs=None if known is None else taken / known,
            )
        )
    return readings


def _rows(config: Config, setting: Setting) -> Sequence[BucketRows]:
    """Of the version that step 0 draws from, if it is built; nothing is decoded."""
    place, versions = config.data.cache, config.data.versions
    try:
        if versions:
            return Version.read(Storage(place), versions[min(versions, key=int)]).buckets
        if is_url(place) or not (Path(place) / FOLDER).is_dir():
            return ()
        made = CacheBuild.planned(config.data, setting.encoding, Path(place)).version()
        return () if made is None else Version.of(Path(place), made).buckets
    except CinemeshError:
        return ()  # clips or cache are elsewhere: training says it


def print_readings(console: Console, readings: Sequence[BucketReading], storage_bytes_per_s: float | None) -> None:
    """A line each, and the most that is read beside what the storage gives all ranks."""
    table = plain_table("bucket", *NUMBERS, right=NUMBERS)
    for one in readings:
        epochs = "" if one.epochs is None else f"{one.epochs:.3g}"
        sample, read = f"{one.sample_bytes / 1e6:.3g} MB", f"{one.bytes_per_s / 1e9:.3g} GB/s"
        table.add_row(one.bucket, sample, read, f"{one.samples:,}", epochs)
    console.print()
    console.print(table)
    most = max(one.bytes_per_s for one in readings)
    if storage_bytes_per_s is not None:
        console.print(
            f"\nsteps read at most {most / 1e9:.3g} GB/s: {most / storage_bytes_per_s:.2%} of what the cluster file "
            "gives of its storage"
        )
    if any(one.epochs is None for one in readings):
        console.print("epochs are told where the latent cache is built: cinemesh data build")
