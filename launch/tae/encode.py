"""``cinemesh tae encode``: latents of the windows of a recipe's clips, their tiles spread over processes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...data.cache.decoding import decoded_windows
from ...data.clips import write_mp4
from ...errors import CinemeshError
from ...files import atomic_file, check_output_file, check_output_folder
from ...model.tae.codec import TAECodec
from ...model.tae.files import read_trained
from ...parallel.ir.plan import Plan
from ...parallel.runtime.comm import Communicator
from ..cluster.environment import processes_here, say_device, world_size
from ..cluster.processes import joined, launch, rank_main
from ..options import Device
from ..training.recipe import Config, read_config
from ..written import wrote


def run(
    autoencoder: Path,
    *,
    config: Path,
    out: Path,
    decoded: Path | None,
    nproc: int | None,
    device: Device,
    overrides: Sequence[str],
) -> None:
    """Encode on ``nproc`` processes of this machine, or on those that torchrun started. Exits with the ranks' code.

    Raises CinemeshError for what is no autoencoder, for a recipe that cannot be, and for what cannot be written.
    """
    recipe = read_config(config, overrides)
    read_trained(autoencoder, "DIR")
    check_output_file(out, "--out")
    if decoded is not None:
        check_output_folder(decoded, "--decoded")
    world, local = world_size(nproc), nproc or 1
    say_device(device, processes_here(world))
    given = (autoencoder, recipe, out, decoded, device)
    code = launch(local, encode_windows, *given) if local > 1 else rank_main(lambda: encode_windows(*given))
    if code:
        sys.exit(code)


def encode_windows(autoencoder: Path, recipe: Config, out: Path, decoded: Path | None, device: Device) -> None:
    """The work of one rank: rank 0 writes."""
    with joined(Plan(dp_replicate=world_size(None), dtype="float32"), device) as place:
        codec = TAECodec(read_trained(autoencoder, "DIR"), place.device)
        communicator = Communicator(place.mesh) if place.mesh else None
        for bucket in recipe.data.shapes:
            bucket.latent(codec)
        latents: dict[str, Tensor] = {}
        for scene, cut, _, first, frames in decoded_windows(recipe.data, progress=place.rank == 0):
            name = f"{scene.name}.{cut.bucket}.{first}"
            latent = codec.encode(frames, communicator)
            latents[name] = latent
            if decoded is not None:
                pieces = list(codec.decoded(latent, communicator))
                if place.rank == 0:
                    write_mp4(decoded / f"{name}.mp4", torch.cat(pieces)[: len(frames)], cut.rate)
        if place.rank == 0:
            if not latents:
                raise CinemeshError("no window of the recipe's clips was read", remedy="look at its captions and clips")
            with atomic_file(out) as part:
                save_file(latents, part, metadata={"latents": codec.fingerprint})
            wrote(out, f"codec: {{kind: tae, path: {autoencoder}}} in a recipe makes these latents as it trains")
