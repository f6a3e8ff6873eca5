"""Clips that people keep for finetuning: the page in a real browser, what it refuses, the manifest that comes out."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from browser import CHROMIUM, Browser
from layout import SCREENS, faults, measured, signed_in
from local_requests import ask, serving

from cinemesh.data.clips import write_mp4
from cinemesh.data.manifest import ClipManifest
from cinemesh.errors import CinemeshError
from cinemesh.evaluation.picking_page import PickingServer
from cinemesh.evaluation.picks import PICKS_FILE, clips_to_pick, read_checklist, read_picks, write_picked
from cinemesh.launch.commands.pick import export_picked

EVIL = '<img src=x onerror="window.evil=1"></script><script>window.evil=1</script>'


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three clips: a part of a file, a whole one, and one with what a captioner may say; a column more than is read."""
    folder = tmp_path / "set"
    folder.mkdir()
    frames = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3).contiguous() * 5
    for name in ("taxi", "bus", "evil"):
        write_mp4(folder / f"{name}.mp4", frames, Fraction(10))
    table = pa.table({
        "clip": ["taxi", "bus", "evil"],
        "file": ["taxi.mp4", "bus.mp4", "evil.mp4"],
        "first_s": pa.array([1.0, None, None], pa.float64()),
        "last_s": pa.array([4.0, None, None], pa.float64()),
        "caption": ["A taxi.", "A bus.", EVIL],
        "weight": [1.0, 0.5, 2.0],
        "aesthetic": [5.1, 6.2, 7.3],
    })  # fmt: skip
    pq.write_table(table, folder / "curated.parquet")
    return folder / "curated.parquet"


def pick(**changed: Any) -> dict[str, Any]:
    good = {"clip": "taxi", "person": "ann", "keep": True, "first_s": 1.5, "last_s": 3.5, "caption": "A taxi turns."}
    return good | {"flaws": []} | changed


WRONG = {
    "is no clip of the manifest; did you mean 'taxi'": {"clip": "taxo"},
    "last_s(1) <= first_s(2)": {"first_s": 2, "last_s": 1},
    "first_s is -1": {"first_s": -1},
    "NaN is no finite number": {"first_s": float("nan")},
    "first_s is True": {"first_s": True},
    "0.5 to 3.5 s is not within the clip's 1 to 4 s": {"first_s": 0.5},
    "1.5 to 4.5 s is not within": {"last_s": 4.5},
    "1.5 to the end s is not within": {"last_s": None},
    "kept with shake": {"flaws": ["shake"]},
    "kept without a caption": {"caption": " "},
    "known: light, colour, clutter, shake, overlay": {"flaws": ["smell"]},
    "keep is 'yes'": {"keep": "yes"},
    "person is ' '": {"person": " "},
    "caption is 3": {"caption": 3},
}


def test_a_pick_is_on_the_disk_and_a_wrong_one_is_not(manifest: Path) -> None:
    with serving(PickingServer(manifest, 0)) as server:
        status, page, _ = ask(server, "/")
        assert status == 200 and EVIL.encode() not in page and b"<img src=x" not in page
        assert ask(server, "/pick", pick())[0] == 200
        for said, changed in WRONG.items():
            status, body, _ = ask(server, "/pick", pick(**changed))
            assert status == 400 and said in json.loads(body)["error"], (said, body)
        assert ask(server, "/pick", [])[0] == ask(server, "/pick", pick(more=1))[0] == 400
        assert ask(server, "/pick", pick(), Host="evil.example")[0] == 403
        assert ask(server, "/pick", pick(), Content_Type="text/plain")[0] == 400
        status, clip, headers = ask(server, "/clips/1", Range="bytes=4-7")
        assert (status, clip, headers["Content-Type"]) == (206, b"ftyp", "video/mp4")
        for path in ("/clips/3", "/curated.parquet", "/../set/curated.parquet", "/clips/../curated.parquet"):
            assert ask(server, path)[0] == 404
        assert [*json.loads(ask(server, "/state")[1])] == ["taxi"]
    assert len(manifest.with_name(PICKS_FILE).read_text().splitlines()) == 1


def test_what_was_kept_is_a_manifest_to_train_on(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trimmed, under people's captions, in the manifest's order; its other columns stay. The last pick counts."""
    lines = [
        pick(clip="evil", first_s=0, last_s=None, caption="Light rises."),
        pick(keep=False, flaws=["light", "clutter"], caption=""),
        pick(),
        pick(clip="bus", keep=False, first_s=0, last_s=None),
    ]
    manifest.with_name(PICKS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"clip": "ta')
    out = manifest.parent.parent / "elsewhere" / "picked.parquet"
    export_picked(manifest=manifest, out=out)
    assert "2 of 3 clips, 1 dropped, 0 not looked at" in capsys.readouterr().err
    rows = pq.read_table(out).to_pylist()
    assert [(row["clip"], row["first_s"], row["last_s"], row["caption"]) for row in rows] == [
        ("taxi", 1.5, 3.5, "A taxi turns."), ("evil", 0.0, None, "Light rises.")
    ]  # fmt: skip
    assert [(row["weight"], row["aesthetic"]) for row in rows] == [(1.0, 5.1), (2.0, 7.3)]
    scenes = [*ClipManifest(out)]
    assert all(isinstance(scene.source, Path) and scene.source.is_file() for scene in scenes)
    assert [(scene.from_s, scene.until_s, scene.weight) for scene in scenes] == [(1.5, 3.5, 1.0), (0, None, 2.0)]


def test_several_captions_give_way_to_the_one_that_a_person_wrote(manifest: Path) -> None:
    table = pq.read_table(manifest)
    kind = pa.list_(pa.struct([("text", pa.string()), ("weight", pa.float64())]))
    several = [[{"text": "A", "weight": 1.0}, {"text": "B", "weight": 2.0}]] * 3
    pq.write_table(table.drop_columns(["caption"]).append_column("captions", pa.array(several, kind)), manifest)
    clips = clips_to_pick(manifest)
    manifest.with_name(PICKS_FILE).write_text(json.dumps(pick()) + "\n")
    assert write_picked(manifest, manifest.with_name("out.parquet"), clips, read_picks(manifest, clips)) == 1
    (scene,) = ClipManifest(manifest.with_name("out.parquet"))
    assert [wording.text for wording in scene.wordings] == ["A taxi turns."]


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("picked.csv", "is no .parquet file"),
        ("curated.parquet", "is the manifest itself"),
        ("picked.parquet", "was kept; cinemesh pick serve"),
    ],
)
def test_an_export_of_nothing_is_refused(manifest: Path, out: str, said: str) -> None:
    with pytest.raises(CinemeshError, match=said):
        export_picked(manifest=manifest, out=manifest.with_name(out))


def test_clips_that_cannot_be_shown_are_refused(manifest: Path) -> None:
    (manifest.parent / "bus.mp4").rename(manifest.parent / "car.mp4")
    with pytest.raises(CinemeshError, match=r"bus\.mp4, of clip bus, is not there"):
        PickingServer(manifest, 0)
    table = pq.read_table(manifest)
    pq.write_table(table.set_column(0, "clip", pa.array(["taxi", "bus", "taxi"])), manifest)
    with pytest.raises(CinemeshError, match="has two clips 'taxi'"):
        clips_to_pick(manifest)
    rows = {"clip": ["a"], "file": ["a.tar"], "member": ["a.mp4"], "offset": [0], "bytes": [9], "caption": ["A."]}
    pq.write_table(pa.table(rows), manifest)
    with pytest.raises(CinemeshError, match="'a' is a member of a tar"):
        clips_to_pick(manifest)


def shown(name: str) -> str:
    return f"!document.getElementById('{name}').hidden"


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_can_be_read(browser: Browser, manifest: Path, screen: str) -> None:
    """Guideline, and a clip with its caption, span and checklist."""
    with serving(PickingServer(manifest, 0)) as server:
        signed_in(browser, screen, server.address)
        browser.press("g")
        browser.wait("document.querySelector('video').readyState >= 2")
        found = measured(browser)
        assert list(faults(found)) == [] and len(found["videos"]) == 1


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_clips_are_picked_by_keyboard_alone_over_a_reload(manifest: Path, tmp_path: Path) -> None:
    """Trimmed by the player's time, captioned, dropped for a flaw; nothing of a caption runs in the page."""
    assert [flaw.name for flaw in read_checklist()] == ["light", "colour", "clutter", "shake", "overlay"]
    progress = "document.getElementById('progress').textContent"
    with serving(PickingServer(manifest, 0)) as server, Browser(tmp_path / "profile") as page:
        page.open(server.address)
        page.wait("document.activeElement && document.activeElement.id === 'name'")
        page.type("ann")
        page.press("Enter")
        page.wait(shown("guideline"))
        page.press("g")
        page.wait(f"{progress} === '1 of 3' && document.querySelector('video').readyState >= 2")
        page.wait("document.querySelector('video').currentTime >= 1")  # where the clip begins
        page.press(" ")
        page.value("document.querySelector('video').currentTime = 2")
        page.wait("!document.querySelector('video').seeking")
        page.press("i")
        page.wait("document.getElementById('span').textContent === '2.00 s to 4.00 s'")
        page.press("c")
        page.wait("document.activeElement.id === 'caption'")
        page.value("document.activeElement.select()")
        page.type("A taxi turns.")
        page.press("Enter", ctrl=True)
        page.press("k")
        page.wait(f"{progress} === '2 of 3'")
        page.reload()
        page.wait(f"document.readyState === 'complete' && {progress} === '2 of 3'")
        page.press("4")
        page.press("k")  # not with a flaw
        page.press("d")
        page.wait(f"{progress} === '3 of 3'")
        page.press("k")
        page.wait(shown("done"))
        assert page.value("window.evil === undefined")
    clips = clips_to_pick(manifest)
    found = read_picks(manifest, clips)
    assert {name: (each.keep, each.flaws) for name, each in found.items()} == {
        "taxi": (True, ()), "bus": (False, ("shake",)), "evil": (True, ())
    }  # fmt: skip
    taxi = found["taxi"]
    assert (taxi.first_s, taxi.last_s, taxi.caption, taxi.person) == (2.0, 4.0, "A taxi turns.", "ann")
    assert found["evil"].caption == EVIL
