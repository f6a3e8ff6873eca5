"""``cinemesh list``: what can be named: models, clusters, text encoders, recipes; as tables or JSON (torch-free)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ...model.config import PRESETS, USUAL_LATENTS, latent_text, parameters
from ...perf_model.clusters.cluster import load, names
from ...perf_model.prices.encoders import FROZEN
from ..tables import new_console, plain_table

RECIPES = Path(__file__).resolve().parents[2] / "configs"

# How ``data.encoders`` of a recipe names one of its two kinds; bytes have no weights.
IN_A_RECIPE: list[dict[str, object]] = [
    {"name": "bytes", "weight_bytes": 0, "about": "in a recipe: {name: bytes, width: 64, tokens: 64}"},
    {
        "name": "any other",
        "weight_bytes": None,
        "about": "in a recipe: {name: NAME, directory: DIR, tokens: 256}, an encoder that transformers saved in DIR",
    },
]


def known() -> dict[str, list[dict[str, object]]]:
    """What there is of each kind, as ``--json`` prints it. Bytes are of one GPU, or of an encoder's weights."""
    models: list[dict[str, object]] = [
        {
            "name": config.name,
            "parameters": sum(row.elements for row in parameters(config)),
            "layers": config.layers,
            "width": config.width,
            "heads": config.heads,
            "usual_latent": latent_text(USUAL_LATENTS[config.name]),
            "tokens": config.tokens(USUAL_LATENTS[config.name]),
        }
        for config in PRESETS.values()
    ]
    clusters: list[dict[str, object]] = [
        {
            "name": cluster.name,
            "gpus": cluster.gpus,
            "gpus_per_server": cluster.gpus_per_server,
            "memory_bytes": round(cluster.gpu.memory_bytes),
            "about": cluster.about,
        }
        for cluster in map(load, names())
    ]
    frozen: list[dict[str, object]] = [
        {"name": e.name, "weight_bytes": e.bytes, "about": "priced by plan --encoders"} for e in FROZEN
    ]
    return {"models": models, "clusters": clusters, "encoders": [*frozen, *IN_A_RECIPE], "recipes": recipes()}


def recipes() -> list[dict[str, object]]:
    """Recipes that ship with the package: path, and the first line that each says of itself."""
    found: list[dict[str, object]] = []
    for path in sorted(RECIPES.glob("**/*.yaml")):
        text = path.read_text(encoding="utf-8")
        if "\nmodel:\n" in text:  # captions have no such section
            found.append({"name": os.path.relpath(path), "about": text.splitlines()[0].removeprefix("# ")})
    return found


def run(*, as_json: bool) -> None:
    """Print it."""
    found = known()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = new_console()
    for kind, rows in found.items():
        numbers = [name for name, value in rows[0].items() if isinstance(value, int)]
        table = plain_table(*map(_title, rows[0]), right=[*map(_title, numbers)])
        for row in rows:
            table.add_row(*(_shown(name, value) for name, value in row.items()))
        console.print(f"{kind}\n")
        console.print(table)
        console.print()
    console.print(
        "--model and --cluster also take a file. Every part of a model: cinemesh model NAME; every constant of a "
        "cluster: cinemesh cluster NAME"
    )


def _title(name: str) -> str:
    return name.removesuffix("_bytes") + ", GB" if name.endswith("_bytes") else name.replace("_", " ")


def _shown(name: str, value: object) -> str:
    if not isinstance(value, int):
        return "" if value is None else str(value)
    return f"{value / 1e9:.1f}" if name.endswith("_bytes") else f"{value:,}"
