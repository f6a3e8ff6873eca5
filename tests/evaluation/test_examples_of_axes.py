"""AxisExample clips of the guideline page: one of every axis, drawn or a user's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clip_folders import bench, clip
from PIL import Image
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.evaluation.axes import all_axes
from cinemesh.evaluation.blinding import read_pairs
from cinemesh.evaluation.examples import EXAMPLE_CHANGES, FRAMES, read_examples, scene_frames, write_examples
from cinemesh.evaluation.serving import JudgeServer, page_of
from cinemesh.launch.cli import app


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    write_examples(folder, all_axes().values(), None)
    return folder


def test_every_axis_has_an_example_that_differs(drawn: Path) -> None:
    """Videos move in both files; an image is one frame; all are small."""
    found = read_examples(drawn)
    assert [each.axis for each in found] == [*all_axes()]
    for each in found:
        sides = []
        for name in (each.better, each.worse):
            file = drawn / "examples" / name
            assert 1000 < file.stat().st_size < 300_000
            with Image.open(file) as image:
                frames = getattr(image, "n_frames", 1)
                image.seek(frames - 1)
                sides.append(np.asarray(image.convert("RGB"), dtype=float))
            assert (frames == 1) == (all_axes()[each.axis].media == "image") and frames <= FRAMES
        assert np.abs(sides[0] - sides[1]).mean() > 1.5 or each.axis == "naturalness", each


def test_a_change_does_what_it_says() -> None:
    frames = scene_frames("taxi")
    assert EXAMPLE_CHANGES["none"](frames) == frames
    for name, change in EXAMPLE_CHANGES.items():
        changed = change(frames)
        assert len(changed) == len(frames) and {each.size for each in changed} == {frames[0].size}, name
    pixels = [np.asarray(each, dtype=float) for each in EXAMPLE_CHANGES["still"](frames)]
    real = [np.asarray(each, dtype=float) for each in frames]
    assert np.abs(pixels[-1] - pixels[0]).mean() < 0.7 * np.abs(real[-1] - real[0]).mean()
    jerked = EXAMPLE_CHANGES["jerk"](frames)
    assert len({id(each) for each in jerked}) < len(frames) and jerked[4] is frames[0] and jerked[2] is frames[4]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n, system in enumerate(("a", "b")):
        clip(tmp_path / system / "dog.mp4", n)
    bench(tmp_path / "bench.yaml", ["dog"])
    own = tmp_path / "own"
    clip(own / "good.mp4", 7)
    shutil.copy(own / "good.mp4", own / "bad.mp4")
    row = {"axis": "realness", "better": "good.mp4", "worse": "bad.mp4", "prompt": "", "why": "<b>See</b>."}
    (own / "examples.yaml").write_text(json.dumps([row, row | {"axis": "flaws"}]))
    return tmp_path


def make(folder: Path, *options: str) -> str:
    """What a refused ``judge make`` says, else "" ."""
    words = ["judge", "make", str(folder / "a"), str(folder / "b"), "--prompts", str(folder / "bench.yaml")]
    done = CliRunner().invoke(app, [*words, "--out", str(folder / "out"), *options])
    assert done.exit_code == 0 or isinstance(done.exception, CinemeshError), done.exception
    return str(done.exception) if done.exit_code else ""


def test_a_users_examples_are_shown_of_the_axes_that_are_asked(folder: Path) -> None:
    """Escaped, and served; what the list does not name has no address."""
    assert make(folder, "--examples", str(folder / "own"), "--axis", "realness") == ""
    out = folder / "out"
    (found,) = read_examples(out)
    page = page_of(read_pairs(out), [found]).decode()
    assert 'src="/examples/good.mp4"' in page and "&lt;b&gt;See&lt;/b&gt;" in page and "<b>See" not in page
    server = JudgeServer(out, 0)
    assert server.examples.keys() == {"good.mp4", "bad.mp4"}
    server.server_close()


def test_examples_that_are_none_are_refused_before_anything_is_written(folder: Path) -> None:
    own = folder / "own"
    assert "cannot read the examples" in make(folder, "--examples", str(folder))
    row = json.loads((own / "examples.yaml").read_text())[0]
    for change, says in (
        ({"better": "../a/dog.mp4"}, "files are called after it"),
        ({"better": "examples.yaml"}, "is no clip or image of its folder"),
        ({"worse": "none.mp4"}, "none.mp4 is no clip or image of its folder"),
        ({"why": 3}, "why is 3"),
    ):
        (own / "examples.yaml").write_text(json.dumps([row | change]))
        assert says in make(folder, "--examples", str(own)), says
    assert not (folder / "out").exists()


def test_examples_are_drawn_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from cinemesh.evaluation.axes import all_axes\n"
        "from cinemesh.evaluation.examples import write_examples\n"
        f"write_examples(Path({str(tmp_path)!r}), [all_axes()['realness']], None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_examples(tmp_path)) == 1
