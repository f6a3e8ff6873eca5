"""Pairs that do not say which system is which: what is drawn, what is written, what is refused."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
from clip_folders import bench, clip, image
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.evaluation.bench import BenchPrompt, read_prompts
from cinemesh.evaluation.blinding import Draw, draw_pairs, make_pairs, read_pairs
from cinemesh.evaluation.clip_files import Form, common_form, content_digest, form_of
from cinemesh.evaluation.votes import read_key
from cinemesh.launch.cli import app

PROMPTS = [BenchPrompt(f"n{n}", f"Prompt {n}.") for n in range(200)]
NAMES = ["dog", "cat"]


@pytest.mark.parametrize("systems", [("a", "b"), ("a", "b", "c")])
def test_sides_are_balanced_and_checks_are_drawn(systems: tuple[str, ...]) -> None:
    """Each system stands left in half of its pairs with each other one; the seed draws everything."""
    pairs = draw_pairs(systems, PROMPTS, Draw(seed=4))
    scored = [pair for pair in pairs if pair.scored]
    combinations = len(systems) * (len(systems) - 1) // 2
    assert len(scored) == 200 * combinations
    for one, other in ((one, other) for one in systems for other in systems if one < other):
        met = [pair for pair in scored if {pair.left, pair.right} == {one, other}]
        assert len({pair.prompt for pair in met}) == 200 and sum(pair.left == one for pair in met) == 100
    assert sum(pair.identical for pair in pairs) == sum(bool(pair.repeats) for pair in pairs) == 10 * combinations
    seen = {}
    for number, pair in enumerate(pairs, 1):
        assert pair.name == f"p{number:04}"
        if pair.repeats:
            first = seen[pair.repeats]
            assert (first.left, first.right, first.prompt) == (pair.right, pair.left, pair.prompt)
        seen[pair.name] = pair
    assert pairs == draw_pairs(systems, PROMPTS, Draw(seed=4)) != draw_pairs(systems, PROMPTS, Draw(seed=5))
    order = [pair.prompt for pair in scored]
    assert order != sorted(order, key=[prompt.name for prompt in PROMPTS].index)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two systems, two prompts."""
    folder = tmp_path_factory.mktemp("made")
    for system in ("new", "old"):
        for name in NAMES:
            clip(folder / system / f"{name}.mp4", hash((system, name)) % 2**32)
    bench(folder / "bench.yaml", NAMES)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "work"))


def make(folder: Path, *options: str, systems: tuple[str, ...] = ("new", "old")) -> str:
    """What a refused ``judge make`` says, "" where it is done."""
    words = ["judge", "make", *(str(folder / name) for name in systems), "--out", str(folder / "out")]
    done = CliRunner().invoke(app, [*words, "--prompts", str(folder / "bench.yaml"), *options])
    if done.exit_code == 0:
        return ""
    assert isinstance(done.exception, CinemeshError), done.exception
    return str(done.exception)


def test_the_page_learns_nothing_of_the_systems(folder: Path) -> None:
    """Names stand in the key alone; each file is the one that the key says, byte for byte."""
    assert make(folder, "--identical", "0.5", "--repeated", "0.5", "--best-of", "new=8") == ""
    out = folder / "out"
    key, shown = read_key(out / "key.json"), read_pairs(out)
    assert key.systems == {"new": 8, "old": 1} and len(shown.pairs) == 4 and shown.rate == 12
    for pair in shown.pairs:
        of = key.pairs[pair.name]
        assert pair.prompt == f"A {of.prompt}." and of.motion == "low"
        for system, name in ((of.left, pair.left), (of.right, pair.right)):
            assert content_digest(out / "clips" / name) == content_digest(folder / system / f"{of.prompt}.mp4")
    told = (out / "pairs.json").read_text() + " ".join(path.name for path in (out / "clips").iterdir())
    assert "new" not in told and "old" not in told and len(list((out / "clips").iterdir())) == 8
    assert sorted(path.name for path in out.iterdir()) == ["clips", "examples", "key.json", "pairs.json"]


def test_what_cannot_be_compared_is_refused_by_name(folder: Path) -> None:
    """Missing on one side, the same on both, of another size, length or rate: nothing is written."""
    new, old = folder / "new" / "cat.mp4", folder / "old" / "cat.mp4"
    assert "rename one" in make(folder, systems=("new", "new"))
    assert "1 system is compared with nothing" in make(folder, systems=("new",))
    assert "--best-of odl: no folder is called so; known: new, old" in make(folder, "--best-of", "odl=2")
    assert "--best-of 'old=0' is no SYSTEM=N" in make(folder, "--best-of", "old=0")
    assert "'realnes' is no axis" in make(folder, "--axis", "realnes")
    kept = old.read_bytes()
    for width, frames, rate in ((32, 12, 12), (48, 11, 12), (48, 12, 24)):
        form = f"{width}x32, {frames} frames at {rate} frames/s"
        clip(old, 9, size=(32, width), frames=frames, rate=rate)
        said = make(folder)
        assert f"{old} is {form}" in said and f"{new} is 48x32, 12 frames at 12 frames/s" in said and "--fit" in said
    shutil.copy(new, old)
    assert f"{new} and {old} are the same file" in make(folder)
    old.write_bytes(b"no video")
    assert f"cannot open {old}" in make(folder)
    old.unlink()
    assert f"{folder / 'old'} has no file for 1 of 2 prompts: cat;" in make(folder)
    image(folder / "old" / "cat.png", 3)
    assert f"{folder / 'old'} has videos and images" in make(folder)
    old.write_bytes(kept)
    assert "has 2 files for the prompt cat: cat.mp4, cat.png" in make(folder)
    assert "is no folder" in make(folder, systems=("new", "nothing"))
    assert not (folder / "out").exists()
    (folder / "old" / "cat.png").unlink()
    assert make(folder) == "" and "holds another judgement" in make(folder)


def test_two_forms_share_the_smaller_of_everything() -> None:
    wide, high = Form(64, 32, 48, Fraction(24)), Form(48, 51, 30, Fraction(10))
    assert common_form(wide, high) == common_form(high, wide) == Form(48, 32, 20, Fraction(10))
    assert common_form(Form(31, 30), Form(40, 20)) == Form(30, 20)


def test_fit_brings_a_pair_to_one_form(folder: Path) -> None:
    """Cropped around the centre and cut: the other side is copied if it has the form already."""
    old = clip(folder / "old" / "cat.mp4", 5, size=(64, 64), frames=48, rate=24)
    assert make(folder, "--fit", "--identical", "0", "--repeated", "0") == ""
    out = folder / "out"
    key, shown = read_key(out / "key.json"), read_pairs(out)
    for pair in shown.pairs:
        assert (
            form_of(out / "clips" / pair.left) == form_of(out / "clips" / pair.right) == Form(48, 32, 12, Fraction(12))
        )
        if key.pairs[pair.name].prompt == "cat":
            sides = (key.pairs[pair.name].left, pair.left), (key.pairs[pair.name].right, pair.right)
            kept = {system: content_digest(out / "clips" / name) for system, name in sides}
            assert kept["new"] == content_digest(folder / "new" / "cat.mp4") and kept["old"] != content_digest(old)


def test_images_are_compared_with_their_own_axes(tmp_path: Path) -> None:
    for n, system in enumerate(("a", "b", "c")):
        image(tmp_path / system / "dog.png", n, (32, 48) if system == "a" else (40, 40))
    prompts = read_prompts(bench(tmp_path / "bench.yaml", ["dog"]))
    folders = [tmp_path / name for name in "abc"]
    with pytest.raises(CinemeshError, match="and a pair has one size, length and rate"):
        make_pairs(folders, prompts, tmp_path / "out", [], {}, Draw(), fitted=False)
    key = make_pairs(folders, prompts, tmp_path / "out", [], {}, Draw(), fitted=True)
    assert [axis.name for axis in key.axes] == ["faithfulness", "flaws"] and len(key.pairs) == 3
    sizes = {form_of(path) for path in (tmp_path / "out" / "clips").iterdir()}
    assert sizes == {Form(40, 32), Form(40, 40)}


def test_pairs_that_were_changed_by_hand_are_refused(folder: Path) -> None:
    """A path in them would be served."""
    assert make(folder) == ""
    path = folder / "out" / "pairs.json"
    values = json.loads(path.read_text())
    for name in ("../key.json", "/etc/hostname", ".hidden"):
        path.write_text(json.dumps(values | {"pairs": [values["pairs"][0] | {"left": name}]}))
        with pytest.raises(CinemeshError, match="files are called after it"):
            read_pairs(folder / "out")
    (folder / "out" / "clips" / values["pairs"][0]["left"]).unlink()
    path.write_text(json.dumps(values))
    with pytest.raises(CinemeshError, match="is not there"):
        read_pairs(folder / "out")
