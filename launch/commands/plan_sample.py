"""``cinemesh plan --sample``: how long one guided clip takes, and how its ranks share it (torch-free)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ...errors import CinemeshError
from ...model.config import latent_text
from ...model.solvers import PAPER_STEPS
from ...perf_model.prices.models import PriceModels
from ...perf_model.report.explain import digits
from ...perf_model.search.sampling import SampledClip, price_clips
from ..options import On
from ..progress import progress
from ..tables import new_console, plain_table
from . import reply
from .asked import Workload, print_taken, workload
from .reply import ClipPlan, ClipPrices, SampleReply, Schema

GPUS = (8, 16)  # one server and two, unless told
HALVES = {"batch": "one batch of two", "groups": "two groups of ranks"}
NUMBERS = ("clip s", "velocity s", "waits", "peak GB")


def run(
    *,
    on: On,
    gpus: int | None,
    latents: Sequence[str],
    dtype: str | None,
    recipe: Path | None,
    beside: Sequence[str],
    as_json: bool,
) -> None:
    """Print the latency of a clip of each latent.

    ``beside``: options that were given too, and are of a search. Raises CinemeshError for these, where no plan divides
    model and latent, and as :func:`workload`.
    """
    if beside:
        raise CinemeshError(
            f"--sample prices one clip, and {', '.join(beside)}: of a search for training plans",
            remedy="ask for one of them",
        )
    load = workload(on, latents, dtype, recipe)
    models, counts = PriceModels.of(load.cluster), (gpus,) if gpus else GPUS
    jobs = [(count, bucket.latent) for count in counts for bucket in load.buckets]
    prices: list[ClipPrices] = []
    console = new_console()
    with progress("pricing", len(jobs), silent=as_json) as begin:
        for count, latent in jobs:
            begin(f"{latent_text(latent)} on {count} GPUs")
            found = price_clips(load.config, latent, models, count, load.dtype, PAPER_STEPS)
            prices.append(
                ClipPrices(
                    gpus=count,
                    latent=latent_text(latent),
                    tokens=load.config.tokens(latent),
                    steps=PAPER_STEPS,
                    plans=[_told(clip) for clip in found],
                )
            )
    told = SampleReply(
        schema=Schema(name="plan --sample"), model=load.model, cluster=load.cluster.name, clips=prices, taken=load.taken
    )
    if as_json:
        print(reply.text(told))
    else:
        _print(console, load, told)


def _told(clip: SampledClip) -> ClipPlan:
    return ClipPlan(
        plan=clip.plan.to_dict(),
        guidance=clip.guidance,
        clip_s=clip.clip_s,
        velocity_s=clip.velocity_s,
        exposed_s=clip.exposed_s,
        peak_bytes=clip.peak_bytes,
        fits=clip.fits,
    )


def _print(console: Console, load: Workload, told: SampleReply) -> None:
    print_taken(console, load)
    for prices in told.clips:
        console.print(
            f"{load.config.name}: one guided clip of {prices.latent} ({prices.tokens:,} tokens), {prices.steps} Euler "
            f"steps on {prices.gpus} GPUs of {told.cluster}, {load.dtype}. Predicted, not measured.\n"
        )
        table = plain_table("", "plan", "guidance", *NUMBERS, right=NUMBERS)
        for place, clip in enumerate(prices.plans, 1):
            table.add_row(
                str(place) if clip.fits else "-",
                f"tp={clip.plan['tp']} cp={clip.plan['cp']}",
                HALVES[clip.guidance],
                digits(clip.clip_s, 3),
                digits(clip.velocity_s, 3),
                f"{clip.exposed_s / clip.velocity_s:.0%}",
                f"{clip.peak_bytes / 1e9:.1f}" + " too much" * (not clip.fits),
            )
        console.print(table)
        console.print()
    console.print("not counted: text encoders, and the decoding of the clip")
