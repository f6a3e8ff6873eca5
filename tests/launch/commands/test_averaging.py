"""An average of checkpoints: by hand, whatever plans wrote its members; which are kept; what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import TINY, assert_read_under, plain_states, plan_of, write_under
from torch import Tensor
from training import recipe, start
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.launch.commands import average
from cinemesh.launch.commands.average import AVERAGED, run
from cinemesh.launch.training.checkpoint.alone import write_alone
from cinemesh.launch.training.checkpoint.choosing import FOLDER
from cinemesh.launch.training.checkpoint.layout import Coordinates, Layout
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.sample import FRAME_RATE

pytestmark = pytest.mark.usefixtures("one_process")


def merged(out: Path, *members: Path, **asked: Any) -> dict[str, dict[str, Tensor]]:
    """The average, read without the package."""
    run(members=members, out=out, **({"shares": None, "config": None, "greedy": False, "overrides": ()} | asked))
    return plain_states(out)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three of one model, each of another plan and other values: as numbered, times 1, -2 and 0.3."""
    folder = tmp_path_factory.mktemp("several")
    write_under(plan_of("tp=2,dp_shard=2", "float32"), folder / "a")
    whole = plain_states(folder / "a")
    for name, factor in (("b", -2.0), ("c", 0.3)):

        def fill(layout: Layout, at: Coordinates, flats: dict[str, Tensor], factor: float = factor) -> None:
            for state, flat in flats.items():
                for piece in layout.runs(at):
                    held = whole[state][piece.parameter.name].flatten()[piece.start : piece.stop]
                    flat[piece.position : piece.position + len(held)] = held * factor

        write_alone(folder / name, TINY, {"master": "float32", "ema": "float32"}, fill, step=9, updates=8, note={})
    return [folder / name for name in "abc"]


def test_an_average_is_that_of_every_element(several: list[Path], tmp_path: Path) -> None:
    """Written under three plans; of both weights. A share that goes to another member shows: factors differ."""
    got = merged(tmp_path / "out", *several, shares="0.5,0.2,0.3")
    parts = [plain_states(path) for path in several]
    for state in ("master", "ema"):
        for name, value in got[state].items():
            due = sum(w * part[state][name].double() for w, part in zip((0.5, 0.2, 0.3), parts, strict=True))
            assert isinstance(due, Tensor) and torch.equal(value, due.float()), (state, name)
    found = read_manifest(tmp_path / "out")
    assert (found.step, found.updates, list(found.states)) == (9, 8, ["master", "ema"])
    assert [(m["checkpoint"], m["share"]) for m in found.note[AVERAGED]] == [
        (str(path), share) for path, share in zip(several, (0.5, 0.2, 0.3), strict=True)
    ]


def test_an_average_of_equals_is_each_bit_by_bit(tmp_path: Path) -> None:
    """A third of a number, three times, is often its neighbour in float32 too where it is rounded each time."""
    for name, plan in (("a", "tp=2"), ("b", "cp=2,dp_shard=2"), ("c", "")):
        write_under(plan_of(plan, "float32"), tmp_path / name)
    merged(tmp_path / "out", *(tmp_path / name for name in "abc"))
    assert_read_under(plan_of("tp=2,dp_shard=2", "float32"), tmp_path / "out")
    digests = [read_manifest(tmp_path / name).digests for name in ("a", "out")]
    assert digests[0] == digests[1]


# -- held-out losses --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A recipe, and three ends of it: two alike, and one of a run that learnt nothing."""
    folder = tmp_path_factory.mktemp("trained")
    ends: list[Path] = []
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        for name, lr in (("a", 1e-2), ("b", 1.1e-2), ("spoilt", 5.0)):
            values = recipe(clips, folder / name)
            values["data"]["cache"] = str(folder / "cache")
            values["optimizer"]["lr"], values["logging"]["validate_every"] = lr, 0
            assert start(values, folder) == 0
            ends.append(folder / name / "run" / FOLDER / "step-00000006")
    torch.set_num_threads(threads)
    path = folder / "chosen.yaml"
    path.write_text(yaml.safe_dump(values))
    return path, ends


def losses(text: str) -> dict[str, float]:
    return {
        what: float(loss) for what, loss in re.findall(r"^(.*?),? has held-out loss ([0-9.]+) ± [0-9.]+$", text, re.M)
    }


def test_greedy_keeps_what_does_not_raise_the_held_out_loss(
    trained: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The spoilt one is left out of what is written, though it was named first; the plain average is worse."""
    config, (a, b, spoilt) = trained
    got = merged(tmp_path / "greedy", spoilt, a, b, config=config, greedy=True)
    told = losses(capsys.readouterr().err)
    kept = [member["checkpoint"] for member in read_manifest(tmp_path / "greedy").note[AVERAGED]]
    assert str(spoilt) not in kept and kept
    assert any("left out" in what and str(spoilt) in what for what in told)
    parts = [plain_states(Path(path)) for path in kept]
    for name, value in got["ema"].items():
        due = sum(part["ema"][name].double() for part in parts) / len(parts)
        assert isinstance(due, Tensor) and (value - due).abs().max() <= 1e-7 * max(1.0, float(due.abs().max()))
    merged(tmp_path / "plain", spoilt, a, b, config=config)
    plain = losses(capsys.readouterr().err)
    assert plain["the average"] > min(told.values()) and plain[str(a)] < plain[str(spoilt)]
    assert read_manifest(tmp_path / "plain").note[FRAME_RATE] == read_manifest(a).note[FRAME_RATE]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ("0.5,0.5", "are 2, of 3 checkpoints"),
        ("0.5,0.3,0.3", "sum to 1.1, not to 1"),
        ("1.5,-0.3,-0.2", "must be a number above 0"),
        ("nan,0.5,0.5", "must be a number above 0"),
        ("0,0.5,0.5", "must be a number above 0"),
        ("a,b,c", "are no numbers"),
    ],
)
def test_weights_that_are_none_are_refused(several: list[Path], tmp_path: Path, shares: str, said: str) -> None:
    with pytest.raises(CinemeshError, match=re.escape(said)):
        merged(tmp_path / "out", *several, shares=shares)
    assert not (tmp_path / "out").exists()


def test_members_that_do_not_belong_together_are_refused(several: list[Path], tmp_path: Path) -> None:
    """Of another variant, twice the same, alone; and nothing is left of an average that was refused."""
    write_under(plan_of("", "float32"), tmp_path / "other", replace(TINY, layers=1))
    for members, said in (
        ((several[0], tmp_path / "other"), "is of another model: layers is 1 there and 2 here"),
        ((several[0], several[0]), "two checkpoints or more, each once"),
        ((several[0],), "two checkpoints or more, each once"),
        ((several[0], tmp_path / "absent"), "absent"),
    ):
        with pytest.raises(CinemeshError, match=said):
            merged(tmp_path / "out", *members)
    for asked, said in (({"greedy": True}, "needs a held-out loss"), ({"overrides": ["seed=1"]}, "there is none")):
        with pytest.raises(CinemeshError, match=said):
            merged(tmp_path / "out", *several[:2], **asked)
    with pytest.raises(CinemeshError, match="exists"):
        merged(several[2], *several[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_recipe_of_another_model_measures_nothing(several: list[Path], clips: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(clips, tmp_path)))
    with pytest.raises(CinemeshError, match="is of another model: channels is 4 there and 16 here"):
        merged(tmp_path / "out", *several, config=tmp_path / "recipe.yaml")


def test_the_command_takes_what_the_function_takes(
    several: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(average, "run", lambda **asked: given.update(asked))
    words = ["average", *map(str, several), "--out", str(tmp_path), "--weights", "1,2,3", "--config", "r", "--greedy"]
    assert CliRunner().invoke(app, [*words, "--set", "seed=2"]).exit_code == 0
    assert given == {
        "members": [*map(str, several)],
        "shares": "1,2,3",
        "out": str(tmp_path),
        "config": Path("r"),
        "greedy": True,
        "overrides": ["seed=2"],
    }
