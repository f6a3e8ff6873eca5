"""Manifests: clips in files and in tars, by seconds, with captions and weights; bad rows by their number."""

import io
import tarfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cinemesh.data.buckets import BucketSettings
from cinemesh.data.cache.building import build_cache
from cinemesh.data.cache.samples import Cache
from cinemesh.data.clips import write_mp4
from cinemesh.data.codec import BlockDCTCodec
from cinemesh.data.encoding import BlockDCT, Encoding
from cinemesh.data.manifest import ClipManifest
from cinemesh.data.settings import DataSettings
from cinemesh.data.tars import members
from cinemesh.data.text import ByteEncoder
from cinemesh.data.video import read_frames
from cinemesh.errors import CinemeshError
from cinemesh.launch.commands.data_index import run_index

CODEC = BlockDCTCodec()


def clip(path: Path, frames: int = 40) -> None:
    grey = (torch.arange(frames) * 6).to(torch.uint8)[:, None, None, None].repeat(1, 16, 16, 3)
    write_mp4(path, grey, Fraction(10))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """As webdataset has them: a video with a text, an image with JSON, one without a caption, one without a clip."""
    clip(tmp_path / "a.mp4")
    path = tmp_path / "shard-000.tar"
    with tarfile.open(path, "w") as out:
        add(out, "x/0001.mp4", (tmp_path / "a.mp4").read_bytes())
        add(out, "x/0001.txt", b"It brightens.")
        add(out, "x/0002.json", b'{"caption": "Grey.", "license": "CC0"}')
        add(out, "x/0002.png", picture())
        add(out, "x/0003.png", picture())
        add(out, "x/0004.txt", b"Of nothing.")
    return path


def cached(settings: DataSettings, folder: Path) -> Cache:
    encoding = Encoding(BlockDCT(), CODEC, (ByteEncoder(4, 12, "x"),))
    return Cache.open(str(folder), build_cache(settings, encoding, folder, progress=False))


def test_tars_are_indexed_and_encoded_in_place(tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tar.read_bytes()
    out = tmp_path / "clips.parquet"
    run_index(sources=[tar], out=out, caption="caption", split="train")
    assert "2 clips, 1 without a caption are left out" in capsys.readouterr().err
    video, image = ClipManifest(out)
    assert (video.name, video.caption, image.name, image.caption) == (
        "shard-000.x-0001", "It brightens.", "shard-000.x-0002", "Grey.",
    )  # fmt: skip
    buckets = (BucketSettings(frames=16), BucketSettings(frames=1))
    settings = DataSettings((), out, size=16, fps=10, stride=8, buckets=buckets, validation_share=0.0)
    clips, stills = cached(settings, tmp_path / "cache").buckets
    frames = read_frames(tmp_path / "a.mp4", 16, 16)
    assert [(s.scene, s.first_frame) for s in clips.train] == [("shard-000.x-0001", 8 * k) for k in range(4)]
    for sample in clips.train:
        assert torch.equal(sample.latent, CODEC.encode(frames[sample.first_frame :][:16]))
        assert sample.caption == "FPS-10 It brightens."
    still = next(s for s in stills.train if s.scene == "shard-000.x-0002")
    assert still.caption == "Grey." and torch.equal(
        still.latent, CODEC.encode(torch.full((1, 16, 16, 3), 90, dtype=torch.uint8))
    )
    assert tar.read_bytes() == before


def test_an_energon_dataset_is_read_by_its_splits(tar: Path, tmp_path: Path) -> None:
    folder = tmp_path / "energon"
    (folder / ".nv-meta").mkdir(parents=True)
    for n in range(3):
        (folder / f"s_{n:02d}.tar").write_bytes(tar.read_bytes())
    split = folder / ".nv-meta" / "split.yaml"
    split.write_text("exclude: [s_01.tar]\nsplit_parts: {train: ['s_{00..01}.tar'], val: [s_02.tar]}\n")
    for name, shard in (("train", "s_00"), ("val", "s_02")):
        run_index(sources=[folder], out=tmp_path / "m.parquet", caption="caption", split=name)
        assert [scene.name for scene in ClipManifest(tmp_path / "m.parquet")] == [f"{shard}.x-0001", f"{shard}.x-0002"]
    for asked, said in (("test", "has no split 'test'"), ("train", "needs .*s_01.tar, which is not there")):
        if asked == "train":
            split.write_text("split_parts: {train: ['s_{00..01}.tar']}\n")
            (folder / "s_01.tar").unlink()
        with pytest.raises(CinemeshError, match=said):
            run_index(sources=[folder], out=tmp_path / "n.parquet", caption="caption", split=asked)
    assert not (tmp_path / "n.parquet").exists()


@pytest.mark.parametrize("kept", [100, 700, 2000])
def test_a_tar_that_is_cut_short_is_named_with_its_offset(tar: Path, tmp_path: Path, kept: int) -> None:
    tar.write_bytes(tar.read_bytes()[:kept])
    with pytest.raises(CinemeshError, match=r"shard-000\.tar is damaged at offset [0-9,]+: "):
        list(members(tar))
    with pytest.raises(CinemeshError, match="is damaged at offset"):
        run_index(sources=[tar], out=tmp_path / "m.parquet", caption="caption", split="train")
    assert not (tmp_path / "m.parquet").exists()


def written(to: Path, /, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), to)
    return to


def test_a_curated_table_is_a_manifest_of_seconds(tmp_path: Path) -> None:
    """Frames of a video of 10 a second, from its own clock; names from the file and the second."""
    clip(tmp_path / "a.mp4")
    path = written(
        tmp_path / "m.parquet", file=["a.mp4", "a.mp4"], first_s=[0.0, 2.0], last_s=[1.2, 3.6],
        caption=["First.", "Second."], weight=[1.0, 2.0],
    )  # fmt: skip
    settings = DataSettings((), path, size=16, frames=8, fps=10, stride=4, validation_share=0.0)
    (bucket,) = cached(settings, tmp_path / "cache").buckets
    frames = read_frames(tmp_path / "a.mp4", 16, 16)
    rows = [(s.scene, s.first_frame) for s in bucket.train]
    assert rows == [("a", 0), ("a", 4), *(("a@2", 20 + 4 * k) for k in range(3) for _ in range(2))]
    for sample in bucket.train:
        assert torch.equal(sample.latent, CODEC.encode(frames[sample.first_frame :][:8]))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"path": ["a.mp4"], "caption": ["x"]}, "has the columns path, caption, and file and caption are needed"),
        ({"file": ["a.mp4"], "text": ["x"]}, "and file and caption are needed"),
        ({"file": [None], "caption": ["x"]}, "row 1 of .* has no file"),
        ({"file": ["a.mp4"] * 2, "caption": ["x", " "]}, "row 2 of .* has no caption"),
        ({"file": ["a.mp4"], "caption": ["x"], "first_s": [3.0], "last_s": [2.0]}, r"last_s\(2\) <= first_s\(3\)"),
        ({"file": ["a.mp4"], "caption": ["x"], "first_s": [-1.0]}, r"first_s is -1\.0"),
        ({"file": ["a.mp4"], "caption": ["x"], "first_s": [float("nan")]}, "first_s is nan"),
        ({"file": ["a.mp4"], "caption": ["x"], "weight": [-1.0]}, r"weight is -1\.0; it must be 0 to 1,?000"),
        ({"file": ["a.mp4"], "caption": ["x"], "weight": [float("inf")]}, "weight is inf"),
        ({"file": [3], "caption": ["x"]}, "file is 3"),
        ({"file": ["a.mp4"], "caption": ["x"], "clip": ["../x"]}, "files are called after it"),
        ({"file": ["a.tar"], "caption": ["x"], "offset": [512]}, "says of a member of a tar only offset"),
        ({"file": ["a.mp4"], "captions": [[{"text": "x", "weight": 0.0}]]}, r"weight is 0\.0"),
        ({"file": ["a.mp4"], "captions": [[{"text": "", "weight": 1.0}]]}, "text is ''"),
    ],
)
def test_a_bad_row_is_told_by_its_number(tmp_path: Path, columns: dict[str, list[Any]], said: str) -> None:
    with pytest.raises(CinemeshError, match=said):
        list(ClipManifest(written(tmp_path / "m.parquet", **columns)))


def test_what_is_no_parquet_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    with pytest.raises(CinemeshError, match=r"cannot read the manifest .*No such file"):
        ClipManifest(path)
    for data in (b"", b"PAR1 and nothing", b"x" * 5000):
        path.write_bytes(data)
        with pytest.raises(CinemeshError, match="cannot read the manifest"):
            ClipManifest(path)
