"""``cinemesh plan --encode``: what it takes to make the latents of many clips (torch-free)."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

from ...errors import CinemeshError
from ...model.tae.config import TAEConfig, tae_preset
from ...perf_model.clusters.cluster import load
from ...perf_model.prices.compute import Compute
from ...perf_model.prices.encoding import EncodingPrice, price_encoding
from ..tables import new_console

CLIPS = 10**8  # of the paper's pre-training set: O(100)M, Table 3
MOST_CLIPS = 10**12
SHAPE = re.compile(r"(\d{1,5})x(\d{1,5})x(\d{1,5})(?::(\d{1,13}))?")
MODEL = "movie-gen"


def run(asked: str, *, cluster: str, others: list[str], as_json: bool) -> None:
    """Price encoding of ``FRAMESxHEIGHTxWIDTH[:CLIPS]`` by the full-size autoencoder on a cluster's GPU, and print it.

    Raises CinemeshError for another text, for sizes that do not divide, and beside options of a search.
    """
    if others:
        raise CinemeshError(f"--encode beside {', '.join(others)}, of a search", remedy="ask for each by itself")
    found = SHAPE.fullmatch(asked)
    if found is None or not 0 < (clips := int(found[4] or CLIPS)) <= MOST_CLIPS:
        raise CinemeshError(
            f"--encode {asked!r:.100} is not FRAMESxHEIGHTxWIDTH[:CLIPS]",
            remedy="write for example --encode 256x768x768:100000000",
        )
    frames, height, width = (int(size) for size in found.groups()[:3])
    on, config = load(cluster), tae_preset(MODEL)
    price = price_encoding(config, frames, height, width, clips, Compute(on))
    if as_json:
        print(json.dumps({"model": MODEL, "cluster": on.name, "predicted": True} | asdict(price), indent=1))
        return
    new_console().print(price_text(config, asked.partition(":")[0], on.name, price))


def price_text(config: TAEConfig, shape: str, cluster: str, price: EncodingPrice) -> str:
    """In lines."""
    return (
        f"autoencoder {config.name}, clips of {shape}, one GPU of {cluster}. Predicted, not measured.\n"
        f"encode a clip   {price.flops / 1e12:,.0f} TFLOP in {price.tiles} tiles, {price.seconds:.2f} s\n"
        f"decode it       {price.decode_flops / 1e12:,.0f} TFLOP, {price.decode_seconds:.2f} s\n"
        f"its latent      {price.latent_bytes / 1e6:,.2f} MB in bf16, of {price.pixel_bytes / 1e6:,.0f} MB of pixels\n"
        f"weights         {price.weight_bytes / 1e9:.2f} GB\n"
        f"largest map     {price.largest_map_bytes / 1e9:.2f} GB of a tile\n"
        f"{price.clips:,} clips: {price.gpu_hours:,.0f} GPU hours, {price.all_latents_bytes / 1e12:,.1f} TB of latents"
    )
