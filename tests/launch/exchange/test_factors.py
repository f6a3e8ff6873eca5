"""Checkpoints of low-rank factors: merged, resharded, read by PEFT; and the base that they are of."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TINY, filled, plan_of, runner_of, whole_states
from harness import Pool
from peft import PeftModel
from safetensors.torch import load_file

from cinemesh.errors import CinemeshError
from cinemesh.launch.commands.average import run as average
from cinemesh.launch.exchange.exporting import export
from cinemesh.launch.exchange.factors import ADAPTER
from cinemesh.launch.exchange.merging import MERGED, merge
from cinemesh.launch.training.base import BEGUN_WITH, read_base
from cinemesh.launch.training.checkpoint.loading import load, read_parameter
from cinemesh.launch.training.checkpoint.manifest import MANIFEST, read_manifest
from cinemesh.launch.training.checkpoint.saving import save
from cinemesh.launch.training.recipe import StartFrom
from cinemesh.launch.training.start import begin, put_under
from cinemesh.model.config import ModelConfig, parameters, trained
from cinemesh.model.lora import Lora, factors_of
from cinemesh.model.weights import collect, full, initial_values, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.layers.sharded import FROZEN_STATE
from cinemesh.parallel.runtime.comm import gather_objects
from cinemesh.parallel.runtime.mesh import Mesh

ADAPTED = replace(TINY, lora=Lora(3, 6.0))
FILE_BYTES = 1_000_000


def base(folder: Path, seed: int = 0) -> Path:
    """A checkpoint of whole weights: ``seed`` of its master ones, and three more of its average."""
    runner = filled(runner_of(plan_of("")))
    if seed:
        runner.initialise(probe_values(seed))
    return save(folder / f"base-{seed}", runner)


def factors(folder: Path, below: Path, config: ModelConfig = ADAPTED) -> Path:
    """A checkpoint of factors that began on ``below``; nothing of it is zero."""
    runner = runner_of(plan_of(""), config=config)
    begun = begin(StartFrom(checkpoint=below), runner, 5)
    return save(folder / "factors", filled(runner), note={BEGUN_WITH: begun.note})


def by_hand(path: Path, below: Path, which: str) -> dict[str, torch.Tensor]:
    """W + 2 A B, by einsum, of the checkpoints' own parameters."""
    found, under = read_manifest(path), read_manifest(below)
    weights = {row.name: read_parameter(below, under, "ema", row.name) for row in parameters(TINY)}
    for layer in range(TINY.layers):
        for target in Lora(3, 6.0).targets:
            down, up = (read_parameter(path, found, which, f"blocks.{layer}.{f}") for f in factors_of(target))
            shape = weights[f"blocks.{layer}.{target}"].shape
            added = 2 * torch.einsum("ir,ro->io", down.reshape(-1, 3), up.reshape(3, -1))
            weights[f"blocks.{layer}.{target}"] = weights[f"blocks.{layer}.{target}"] + added.view(shape)
    return weights


def test_merged_is_the_base_and_what_the_factors_add(tmp_path: Path) -> None:
    below = base(tmp_path)
    path = factors(tmp_path, below)
    assert merge(path, tmp_path / "merged", None) == TINY
    found = read_manifest(tmp_path / "merged")
    assert found.states == {"master": "float64", "ema": "float64"}
    assert found.note[MERGED]["base"] == read_manifest(below).digests["ema"]
    for which in found.states:
        for name, wanted in by_hand(path, below, which).items():
            got = read_parameter(tmp_path / "merged", found, which, name)
            assert (got - wanted).abs().max() <= 1e-15 * max(1.0, wanted.abs().max().item()), name


def test_a_checkpoint_holds_the_factors_alone(tmp_path: Path) -> None:
    found = read_manifest(factors(tmp_path, base(tmp_path)))
    assert set(found.layout.shapes) == {row.name for row in trained(ADAPTED)}
    assert found.model["lora"] == {"rank": 3, "alpha": 6.0, "targets": list(Lora(3, 6.0).targets)}
    assert found.note[BEGUN_WITH]["weights"] == "ema"


# -- under other plans ------------------------------------------------------------------------------------------------


def read_under(plan: Plan, path: Path, below: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Every state of the factors, and the frozen weights, from a checkpoint of another plan."""
    runner = runner_of(plan, Mesh(plan), config=ADAPTED)
    put_under(StartFrom(checkpoint=below), runner, load(path, runner).note)
    shards: list[Any] = gather_objects((runner.coordinates, runner.buffers[FROZEN_STATE].clone()))
    return whole_states(runner), collect(shards, runner.units.of_frozen)


@pytest.mark.parametrize("text", ["tp=2,cp=2", "tp=2,dp_shard=2"])
def test_trained_shards_reshard(pool: Pool, tmp_path: Path, text: str) -> None:
    below = base(tmp_path)
    path = factors(tmp_path, below)
    states, frozen = pool.run(4, read_under, plan_of(text), path, below)[0]
    for seed, state in enumerate(("master", "exp_avg", "exp_avg_sq", "ema")):
        for name, wanted in full(trained(ADAPTED), probe_values(seed), torch.float64).items():
            assert torch.equal(states[state][name], wanted), (state, name)
    for name, wanted in full(parameters(TINY), probe_values(3), torch.float64).items():
        assert torch.equal(frozen[name], wanted), name


def test_factors_begin_as_nothing(tmp_path: Path) -> None:
    """B is zeros: step 0 is the base, whatever A is; the running average begins equal."""
    below = base(tmp_path)
    runner = runner_of(plan_of(""), config=ADAPTED)
    put_under(StartFrom(checkpoint=below), runner, None)
    begin(StartFrom(checkpoint=below), runner, 5)
    held = full(trained(ADAPTED), initial_values(5), torch.float64)
    for name, value in whole_states(runner)["ema"].items():
        assert torch.equal(value, held[name])
        assert bool(value.any()) is ("lora_A" in name)
    assert runner.buffers["counters"].tolist() == [0, 0]


# -- PEFT -------------------------------------------------------------------------------------------------------------


def exported_model(folder: Path) -> Any:
    """By the export's own class."""
    spec = importlib.util.spec_from_file_location("exported_movie_gen", folder / "movie_gen.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MovieGenTransformer.from_pretrained(folder)


def test_peft_reads_them_on_the_exported_base(tmp_path: Path) -> None:
    """And gives what the export of the merged weights gives."""
    below = base(tmp_path)
    path = factors(tmp_path, below)
    merge(path, tmp_path / "merged", None)
    for source, name in ((below, "hf"), (path, "peft"), (tmp_path / "merged", "hf-merged")):
        export(source, tmp_path / name, which="ema", dtype=None, file_bytes=FILE_BYTES)
    plain, merged = exported_model(tmp_path / "hf"), exported_model(tmp_path / "hf-merged")
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    given = (
        draw(2, TINY.channels, 3, 4, 12),
        torch.tensor([0.2, 0.7], dtype=torch.float64),
        {e.name: draw(2, e.tokens, e.width) for e in TINY.encoders},
        torch.ones(2, TINY.text_tokens, dtype=torch.bool),
    )
    with torch.no_grad():
        without = plain(*given)
        adapted = PeftModel.from_pretrained(plain, str(tmp_path / "peft"))
        loaded = sum("lora_" in name for name, _ in adapted.named_parameters())
        assert loaded == len(load_file(tmp_path / "peft" / ADAPTER)) == 2 * TINY.layers * 11  # K and V by themselves
        wanted = merged(*given)
        assert (adapted(*given) - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert (without - wanted).abs().max() > 1e-2


# -- what is refused --------------------------------------------------------------------------------------------------


def test_factors_of_another_base_are_refused(tmp_path: Path) -> None:
    below, other = base(tmp_path), base(tmp_path, 9)
    path = factors(tmp_path, below)
    with pytest.raises(CinemeshError, match=r"factors are of another base: the ema weights of .*base-9"):
        merge(path, tmp_path / "merged", other)
    runner = runner_of(plan_of(""), config=ADAPTED)
    with pytest.raises(CinemeshError, match="factors are of another base"):
        put_under(StartFrom(checkpoint=other), runner, load(path, runner).note)
    moved = below.rename(tmp_path / "elsewhere")  # wherever it lies, it is known
    merge(path, tmp_path / "merged", moved)
    with pytest.raises(CinemeshError, match="factors are of another base"):  # its other weights are another base, too
        put_under(StartFrom(checkpoint=moved, weights="master"), runner, load(path, runner).note)


def test_factors_on_factors_and_whole_weights_as_factors_are_refused(tmp_path: Path) -> None:
    below = base(tmp_path)
    path = factors(tmp_path, below)
    runner = runner_of(plan_of(""), config=ADAPTED)
    with pytest.raises(CinemeshError, match="holds low-rank factors, and no weights to add others to"):
        begin(StartFrom(checkpoint=path), runner, 0)
    with pytest.raises(CinemeshError, match="holds whole weights"):
        merge(below, tmp_path / "merged", None)
    with pytest.raises(CinemeshError, match=r"lora is .* there"):
        load(path, runner_of(plan_of("")))
    with pytest.raises(CinemeshError, match="their average is not that of what they make"):
        average(
            members=[path, factors(tmp_path / "b", below)], shares=None, out=tmp_path / "m", config=None, greedy=False,
            overrides=[],
        )  # fmt: skip


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    below = base(tmp_path)
    wider = replace(ADAPTED, ffn=2 * TINY.ffn)
    with pytest.raises(CinemeshError, match=r"of another model: ffn is 96 there and 192 here"):
        begin(StartFrom(checkpoint=below), runner_of(plan_of(""), config=wider), 0)
    runner = runner_of(plan_of(""), config=ADAPTED)
    (below / MANIFEST).unlink()
    with pytest.raises(CinemeshError):
        read_base(StartFrom(checkpoint=below), runner.buffers[FROZEN_STATE], runner.units, runner.coordinates)
