"""Low-rank factors for PEFT: a folder that ``PeftModel.from_pretrained`` puts on an export of their base.

    adapter_config.json         rank, alpha, and the modules that have factors
    adapter_model.safetensors   base_model.model.blocks.0.attn1.to_q.lora_A.weight [r, inputs], lora_B [outputs, r]

K and V are one product with one A; an export has two modules, each with that A.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...errors import CinemeshError
from ...model.config import ModelConfig, block_unit
from ...model.lora import factors_of
from ..models import model_of
from ..progress import progress
from ..storage.places import Location
from ..training.base import base_section
from ..training.checkpoint.loading import read_parameter
from ..training.checkpoint.manifest import Manifest
from .names import exported

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
PREFIX = "base_model.model."  # of every weight: PEFT wraps a model twice


def checked_factors(checkpoint: Location, found: Manifest) -> ModelConfig:
    """The model of a checkpoint of low-rank factors. Raises CinemeshError for one of whole weights."""
    config = model_of(found.model, f"the model of checkpoint {checkpoint}")
    if config.lora is None:
        raise CinemeshError(
            f"checkpoint {checkpoint} holds whole weights, and no low-rank factors to merge",
            remedy="name one of a run whose recipe has model.lora",
        )
    return config


def adapted(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(block, product) of all that has factors."""
    assert config.lora is not None
    for layer in range(config.layers):
        for target in config.lora.targets:
            yield block_unit(layer), target


def write_factors(
    checkpoint: Location, found: Manifest, config: ModelConfig, which: str, dtype: torch.dtype, partial: Path
) -> None:
    """The factors ``which`` of a checkpoint, as PEFT has them, into a folder. Raises CinemeshError and OSError."""
    assert config.lora is not None
    begun = base_section(found.note, checkpoint)
    rows, weights, modules = exported(config.base), dict[str, Tensor](), set[str]()
    with progress("exporting", config.layers * len(config.lora.targets)) as begin:
        for block, target in adapted(config):
            begin(f"{block}.{target}")
            down, up = (read_parameter(checkpoint, found, which, f"{block}.{f}").to(dtype) for f in factors_of(target))
            names = [name.removesuffix(".weight") for name in rows[f"{block}.{target}"].names]
            for name, part in zip(names, up.flatten(1).T.chunk(len(names)), strict=True):
                weights[f"{PREFIX}{name}.lora_A.weight"] = down.flatten(0, -2).T.contiguous()
                weights[f"{PREFIX}{name}.lora_B.weight"] = part.contiguous()
                modules.add(name.removeprefix(f"{block}."))
    about = {"format": "pt", "base": f"{begun.weights} of {begun.checkpoint}"}
    save_file(weights, partial / ADAPTER, about)
    adapter = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(modules),
    }
    (partial / ADAPTER_CONFIG).write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")
