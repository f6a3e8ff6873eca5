"""Weights that leave as plain torch and come back: the same values under other names, and the same clip."""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import TINY, plan_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.kernels.philox import Purpose
from cinemesh.launch.exchange import movie_gen
from cinemesh.launch.exchange.exporting import export
from cinemesh.launch.exchange.importing import import_weights
from cinemesh.launch.exchange.names import exported
from cinemesh.launch.training.checkpoint import alone
from cinemesh.launch.training.checkpoint.alone import write_alone
from cinemesh.launch.training.checkpoint.layout import Coordinates, Layout
from cinemesh.launch.training.checkpoint.loading import load_weights, read_parameter
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.model import flow
from cinemesh.model.config import LatentCondition, ModelConfig, parameters
from cinemesh.model.inputs import MASK, BatchShape, text_input
from cinemesh.model.reference import Reference
from cinemesh.model.sampler import Sampler
from cinemesh.model.solvers import linear_quadratic
from cinemesh.model.step import unit_layout
from cinemesh.model.weights import fill_shard, full, probe_values

CONDITIONED = replace(TINY, patch=(1, 2, 3), latent_conditions=(LatentCondition("low_resolution", 3),))
FILE_BYTES = 60_000


def checkpoint(folder: Path, config: ModelConfig = TINY, dtype: str = "float32", seed: int = 3) -> Path:
    """Probe values as ``ema``, and others as ``master``: one taken for the other shows."""

    def fill(layout: Layout, at: Coordinates, flats: dict[str, Tensor]) -> None:
        units = unit_layout(config, plan_of(f"dp_shard={layout.degrees['dp_shard']}", dtype))
        for number, flat in enumerate(flats.values()):
            fill_shard(flat, units, at, probe_values(seed + number))

    path = folder / "step-00000009"
    write_alone(
        path, config, {"ema": dtype, "master": dtype}, fill, step=9, updates=8, note={"frame_rate": "24000/1001"}
    )
    return path


def exported_code(folder: Path) -> ModuleType:
    """The export's own file, loaded as a program would that has no other part of the package."""
    spec = importlib.util.spec_from_file_location("exported_movie_gen", folder / "movie_gen.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def conditions_of(config: ModelConfig, dtype: torch.dtype, samples: int) -> dict[str, Tensor]:
    """Text as the sampler takes it, [L, B, W], and a mask with holes."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(samples, config.text_tokens, dtype=torch.bool)
    mask[0, -1] = mask[-1, 1] = False
    return {MASK: mask} | {
        text_input(e.name): torch.randn(e.tokens, samples, e.width, generator=generator).to(dtype)
        for e in config.encoders
    }


def by_encoder(config: ModelConfig, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    return {e.name: conditions[text_input(e.name)].transpose(0, 1) for e in config.encoders}


def test_its_code_needs_nothing_of_the_package() -> None:
    """Else it would run here and nowhere else."""
    tree = ast.parse(Path(movie_gen.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {(name or ".").split(".")[0] for name in imported} == {
        *("__future__", "collections", "itertools", "json", "math", "pathlib", "safetensors", "torch", "typing")
    }


@pytest.mark.parametrize("config", [TINY, CONDITIONED], ids=["plain", "conditioned"])
def test_the_velocity_is_the_specifications(tmp_path: Path, config: ModelConfig) -> None:
    """Every weight has a value of its own: one transposed or under another's name shows. In float64."""
    export(checkpoint(tmp_path, config, "float64"), tmp_path / "out", which="ema", dtype=None, file_bytes=FILE_BYTES)
    model = exported_code(tmp_path / "out").MovieGenTransformer.from_pretrained(tmp_path / "out")
    reference = Reference(config).double()
    reference.load_state_dict(full(parameters(config), probe_values(3), torch.float64))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.channels, 3, 4, 12, generator=generator, dtype=torch.float64)
    t, conditions = torch.tensor([0.2, 0.7], dtype=torch.float64), conditions_of(config, torch.float64, 2)
    latents = {
        c.name: torch.randn(2, c.channels, 3, 4, 12, generator=generator, dtype=x.dtype)
        for c in config.latent_conditions
    }
    with torch.no_grad():
        want = reference(x, t, conditions | {c.input: latents[c.name] for c in config.latent_conditions})
        got = model(x, t, by_encoder(config, conditions), conditions[MASK], latents)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * float(want.abs().max()))


def test_its_latents_are_those_of_the_sampler(tmp_path: Path) -> None:
    """From the same noise, with guidance, in float32: within 1e-5 of their size."""
    path, batch, steps, ids = checkpoint(tmp_path), BatchShape(2, (3, 4, 12)), 8, torch.tensor([3, 8])
    export(path, tmp_path / "out", which="ema", dtype=None, file_bytes=FILE_BYTES)
    plan = plan_of("", "float32")
    units = unit_layout(TINY, plan)
    flat = torch.empty(units.flat_elements)
    load_weights(path, "ema", flat, units, {"tp": 0, "cp": 0, "dp_shard": 0})
    conditions = conditions_of(TINY, torch.float32, 2)
    sampler = Sampler(TINY, plan, batch, None, flat, guidance=3.0)
    want = sampler.sample(conditions, 1, ids, linear_quadratic(steps))
    code = exported_code(tmp_path / "out")
    zero = torch.tensor(0)
    noise = flow.draw_noise(
        1, zero, ids, torch.zeros_like(ids), (TINY.channels, *batch.latent), Purpose.SAMPLING
    ).float()
    schedule = code.FlowScheduler(steps=steps, guidance=3.0)
    model = code.MovieGenTransformer.from_pretrained(tmp_path / "out")
    got = schedule.sample(model, noise, by_encoder(TINY, conditions), conditions[MASK])
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    assert (want - noise).abs().max() > 0.1, "the model moved it"
    told = code.FlowScheduler.from_pretrained(tmp_path / "out")
    assert (told.steps, told.emulated_steps, told.guidance) == (50, 250, 7.5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_comes_back_is_what_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Through several files on both sides: bit by bit, with step and updates. Values are drawn apart from both."""
    path = checkpoint(tmp_path, CONDITIONED, dtype)
    export(path, tmp_path / "out", which="master", dtype=None, file_bytes=FILE_BYTES)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
    assert (
        sum(w.numel() * w.element_size() for f in files for w in load_file(f).values())
        == index["metadata"]["total_size"]
    )
    monkeypatch.setattr(alone, "SHARD_BYTES", 100_000)
    assert import_weights(tmp_path / "out", tmp_path / "back") == CONDITIONED
    there, back = read_manifest(path), read_manifest(tmp_path / "back")
    assert len(back.files) > 2 and (back.step, back.updates, back.states) == (9, 8, {"master": dtype})
    assert back.note == {"frame_rate": "24000/1001"}, "at which its clips will play"
    assert back.digests["master"] == there.digests["master"]
    want = full(parameters(CONDITIONED), probe_values(4), getattr(torch, dtype))
    for name, values in want.items():
        assert torch.equal(read_parameter(tmp_path / "back", back, "master", name), values), name


def test_half_the_bits(tmp_path: Path) -> None:
    """Rounded once, and kept as they are by what takes them in."""
    export(checkpoint(tmp_path), tmp_path / "out", which="ema", dtype="bfloat16", file_bytes=10**9)
    import_weights(tmp_path / "out", tmp_path / "back")
    back = read_manifest(tmp_path / "back")
    for name, values in full(parameters(TINY), probe_values(3), torch.float32).items():
        assert torch.equal(read_parameter(tmp_path / "back", back, "ema", name), values.bfloat16().float()), name


def test_every_row_of_every_preset_has_names_of_its_own() -> None:
    """On no device: the 30B too."""
    from cinemesh.model.config import PRESETS

    for config in PRESETS.values():
        rows = exported(config)
        names = [name for row in rows.values() for name in row.names]
        assert len(set(names)) == len(names) and list(rows) == [row.name for row in parameters(config)]
        for row in rows.values():
            whole = torch.empty(row.shape, device="meta")
            assert row.join(list(row.split(whole))).shape == whole.shape


def _edit(folder: Path, name: str, change: Any) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def _drop_weight(folder: Path) -> None:
    file = sorted(folder.glob("model-*"))[1]
    save_file(dict(list(load_file(file).items())[1:]), file)


def _cut(folder: Path) -> None:
    file = sorted(folder.glob("model-*"))[1]
    file.write_bytes(file.read_bytes()[:-7])


def _other_values(folder: Path) -> None:
    file = sorted(folder.glob("model-*"))[1]
    save_file({name: w + 1 for name, w in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: _edit(f, "config.json", lambda v: v.update(heads=5)), r"width\(48\) % heads\(5\)"),
        (lambda f: _edit(f, "config.json", lambda v: v.update(layers=3)), "is absent, and"),
        (lambda f: _edit(f, "config.json", lambda v: v.update(layers="many")), "layers"),
        (lambda f: _edit(f, "config.json", lambda v: v.update(num_heads=5)), "unknown key 'num_heads'"),
        (lambda f: _edit(f, "config.json", lambda v: v.update(cinemesh=[1])), "holds no mapping"),
        (lambda f: _edit(f, "model.safetensors.index.json", lambda v: v.update(weight_map=[])), "weight_map is"),
        (
            lambda f: _edit(f, "model.safetensors.index.json", lambda v: v["weight_map"].update(evil="../../x")),
            "files are called after it",
        ),
        (
            lambda f: _edit(
                f, "model.safetensors.index.json", lambda v: v["weight_map"].update(more="gone.safetensors")
            ),
            "gone.safetensors",
        ),
        (_drop_weight, "is absent, and"),
        (_cut, "cannot read"),
        (_other_values, "has been changed"),
    ],
)
def test_what_is_no_export_is_one_message(tmp_path: Path, damage: Any, message: str) -> None:
    """Each names what is wrong, and leaves nothing behind."""
    folder = tmp_path / "out"
    export(checkpoint(tmp_path), folder, which="ema", dtype=None, file_bytes=FILE_BYTES)
    damage(folder)
    with pytest.raises(CinemeshError, match=message):
        import_weights(folder, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "step-00000009"]


def test_no_export_is_begun_in_vain(tmp_path: Path) -> None:
    """A state that is not there, a folder that is."""
    path = checkpoint(tmp_path)
    with pytest.raises(CinemeshError, match="has no emma"):
        export(path, tmp_path / "out", which="emma", dtype=None, file_bytes=FILE_BYTES)
    with pytest.raises(CinemeshError, match="exists"):
        export(path, path, which="ema", dtype=None, file_bytes=FILE_BYTES)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
