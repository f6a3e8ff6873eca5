"""The recipes for GPUs: what a start would refuse, what the planner counts, and the table of docs/gpu.md.

    python tests/launch/training/test_gpu_recipes.py        # writes the table anew; measured columns stay

Only this sees a recipe that no longer fits its card, and a prediction in the table that nobody makes any more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cinemesh.launch.cli import app
from cinemesh.launch.proof.lint import lint_program
from cinemesh.launch.training.recipe import read_config
from cinemesh.launch.training.setting import Setting
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "gpu.md"
FSDP = "dp_shard=8,recompute=o:lse"
COLUMNS = (
    "recipe",
    "cluster",
    "plan",
    "latents",
    "samples",
    "step",
    "measured",
    "MFU",
    "measured",
    "memory",
    "measured",
)
PREDICTED = tuple(place for place, name in enumerate(COLUMNS) if name != "measured")


@dataclass(frozen=True)
class Variant:
    """A recipe under its own plan, or another that its head names; on its own cluster, or on what it was measured."""

    recipe: str
    ranks: int
    plan: str | None = None
    cluster: str | None = None

    @property
    def path(self) -> Path:
        return ROOT / "configs" / f"{self.recipe}.yaml"

    @property
    def overrides(self) -> list[str]:
        asked = [] if self.plan is None else [f"plan={json.dumps(self.plan)}"]
        return asked if self.cluster is None else [*asked, f"cluster={self.cluster}"]


VARIANTS = (
    Variant("gpu-1", 1),
    Variant("gpu-1", 1, cluster="h200-ib400"),
    Variant("gpu-8", 8),
    Variant("gpu-8", 8, FSDP),
)


def told(variant: Variant) -> dict[str, Any]:
    """The dry run: it refuses what does not fit a GPU of the recipe's cluster."""
    words = ["train", str(variant.path), "--dry-run", "--ranks", str(variant.ranks), "--json"]
    done = CliRunner().invoke(app, [*words, *(word for text in variant.overrides for word in ("--set", text))])
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


def rows() -> list[list[str]]:
    """Of the table: what is predicted, with nothing measured."""
    found: list[list[str]] = []
    for variant in VARIANTS:
        said = told(variant)
        plan = Plan.from_dict(said["plan"])
        of_one = "TP4 CP2" if plan.tp > 1 else "FSDP" if plan.world_size > 1 else "one GPU"
        for bucket in said["buckets"]:
            step, memory = f"{bucket['step_s']:.3g} s", f"{bucket['peak_bytes'] / 1e9:.1f} GB"
            head = [variant.recipe, said["cluster"], of_one, bucket["latent"], str(bucket["global_batch"])]
            found.append([*head, step, "", f"{bucket['mfu']:.1%}", "", memory, ""])
    return found


def written(page: str) -> list[list[str]]:
    """The rows of the page's table."""
    below = page[page.index(line_of(COLUMNS)) :].splitlines()[2:]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in takewhile(lambda line: line[:1] == "|", below)]


def line_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def test_the_table_says_what_the_dry_run_says() -> None:
    """The dry run refuses what does not fit. A measured number is of whoever has a GPU."""
    found, said = written(PAGE.read_text(encoding="utf-8")), rows()
    assert [[row[place] for place in PREDICTED] for row in found] == [
        [row[place] for place in PREDICTED] for row in said
    ]


@pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda variant: f"{variant.recipe} {variant.plan or variant.cluster or ''}"
)
def test_a_start_takes_it_and_its_steps_may_be_captured(variant: Variant) -> None:
    """All that a start looks at before the clips; the lint of its last bucket's program, at full size."""
    config = read_config(variant.path, variant.overrides)
    setting = Setting.of(config)
    setting.check_training()
    setting.check_sampling()
    assert config.plan.dtype == "bf16" and config.plan.world_size == variant.ranks and setting.model.head_dim == 128
    assert config.capture == ("required" if variant.ranks == 1 else "auto")
    assert lint_program(build_step(setting.model, config.plan, setting.batches[-1], config.optimizer)) == []


def test_the_recipe_names_its_other_plan() -> None:
    """What is priced in the table is what a reader of the recipe would start."""
    (variant,) = (variant for variant in VARIANTS if variant.plan)
    assert f"-m cinemesh.launch.train configs/{variant.recipe}.yaml --plan {variant.plan}\n" in variant.path.read_text()


def rewrite() -> None:
    page = PAGE.read_text(encoding="utf-8")
    measured = {tuple(row[:5]): row for row in written(page)}
    table = [line_of(COLUMNS), line_of(["---"] * len(COLUMNS))]
    for row in rows():
        old = measured.get(tuple(row[:5]), row)
        table.append(line_of([new if place in PREDICTED else old[place] for place, new in enumerate(row)]))
    begin = page.index(line_of(COLUMNS))
    end = page.index("\n\n", begin)
    PAGE.write_text(page[:begin] + "\n".join(table) + page[end:], encoding="utf-8")


if __name__ == "__main__":
    rewrite()
