"""Windows of one shape or several, the cache and the batch of a data rank."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cinemesh.data import settings as rules
from cinemesh.data.buckets import Bucket, BucketSettings
from cinemesh.data.cache.building import OLD_FILE, SKIPPED_FILE
from cinemesh.data.cache.building import build_cache as build_version
from cinemesh.data.cache.samples import Cache, Sample, Windows, collate
from cinemesh.data.clips import write_mp4
from cinemesh.data.codec import BlockDCTCodec
from cinemesh.data.encoding import BlockDCT, Encoding
from cinemesh.data.settings import DataSettings
from cinemesh.data.tars import TarWriter
from cinemesh.data.text import ByteEncoder
from cinemesh.data.video import read_frames
from cinemesh.data.windows import held_out, windows
from cinemesh.errors import CinemeshError
from cinemesh.model.inputs import IDS, LATENTS, MASK, PLACES, text_input

CODEC = BlockDCTCodec()
ENCODERS = (ByteEncoder(6, 12, "words"), ByteEncoder(4, 5, "letters"))
CAPTIONS = """
- {name: up, file: a.mp4, first_frame: 2, last_frame: 37, caption: "It brightens."}
- {name: short, file: a.mp4, first_frame: 38, last_frame: 49, caption: "It waits."}
"""


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    """A clip of 50 frames, each of its own grey, in a scene of 36 frames and one of 12."""
    frames = (torch.arange(50) * 5).to(torch.uint8)[:, None, None, None].repeat(1, 16, 16, 3)
    write_mp4(tmp_path / "clips" / "a.mp4", frames, Fraction(15))
    (tmp_path / "captions.yaml").write_text(CAPTIONS)
    return DataSettings((str(tmp_path / "clips"),), tmp_path / "captions.yaml", size=16, frames=8, fps=15, stride=3)


UMASK = os.umask(0)
os.umask(UMASK)


def build(settings: DataSettings, folder: Path, codec: BlockDCTCodec = CODEC) -> Cache:
    name = build_version(settings, Encoding(BlockDCT(), codec, ENCODERS), folder, progress=False)
    return Cache.open(str(folder), name)


def opened(cache: Cache) -> Windows:
    """The only bucket of a cache."""
    (samples,) = cache.buckets
    return samples


def shape_of(windows: Windows) -> tuple[int, ...]:
    """(C, T, H, W) of a bucket's latents."""
    return tuple(windows.train[0].latent.shape)


def cut(scene_frames: int, held: int, frames: int, stride: int) -> tuple[range, range]:
    """At one rate, the video's own."""
    return windows(scene_frames, Fraction(scene_frames - held), frames, stride, Fraction(1))


@pytest.mark.parametrize("scene_frames", [8, 15, 16, 17, 30, 61, 132])
@pytest.mark.parametrize("stride", [1, 3, 40])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6])
def test_no_frame_is_in_a_train_and_in_a_validation_window(scene_frames: int, stride: int, share: float) -> None:
    train, validation = cut(scene_frames, held_out(scene_frames, 8, share), 8, stride)
    seen = {first + i for first in train for i in range(8)}
    held = {first + i for first in validation for i in range(8)}
    assert train and not seen & held
    assert seen | held <= set(range(scene_frames))
    assert bool(validation) == (share > 0 and scene_frames >= 16)
    if share == 0.6 and scene_frames == 61 and stride == 1:
        assert train == range(17) and validation == range(24, 54)  # 37 of 61 held


@pytest.mark.parametrize("scene_frames", [8, 24, 32, 47, 48, 61, 132])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_what_one_bucket_validates_on_no_bucket_trains_on(scene_frames: int, share: float) -> None:
    """A border for each bucket would let the short windows train on what the long ones hold out."""
    fitting = [frames for frames in (8, 13, 24) if frames <= scene_frames]
    held = held_out(scene_frames, max(fitting), share)
    both = {frames: cut(scene_frames, held, frames, 3) for frames in fitting}
    seen = {first + i for frames, (train, _) in both.items() for first in train for i in range(frames)}
    kept = {first + i for frames, (_, validation) in both.items() for first in validation for i in range(frames)}
    assert not seen & kept
    for train, validation in both.values():
        assert train and bool(validation) == (scene_frames >= 2 * max(fitting))


def test_samples_are_the_windows_of_the_videos(settings: DataSettings, tmp_path: Path) -> None:
    """Decodes the same frames again, apart from the cache: an offset by one frame shows."""
    cache = opened(build(settings, tmp_path / "cache"))
    frames = read_frames(tmp_path / "clips" / "a.mp4", 16, 16)
    assert shape_of(cache) == (16, 1, 2, 2)
    # 36 frames, 8 held out: starts 0, 3 ... 18 below 28 - 8; 12 frames are too few for both.
    assert [(s.scene, s.first_frame) for s in cache.train] == [
        *(("up", 2 + first) for first in range(0, 21, 3)),
        ("short", 38),
        ("short", 41),
    ]
    assert [(s.scene, s.first_frame) for s in cache.validation] == [("up", 30)]
    assert [s.id for s in (*cache.train, *cache.validation)] == list(range(10))
    for sample in (*cache.train, *cache.validation):
        window = frames[sample.first_frame : sample.first_frame + 8]
        assert torch.equal(sample.latent, CODEC.encode(window))
        assert sample.caption == {"up": "FPS-15 It brightens.", "short": "FPS-15 It waits."}[sample.scene]
        for encoder in ENCODERS:
            text, mask = encoder.encode(sample.caption)
            assert torch.equal(sample.text[encoder.name], text)
            assert torch.equal(sample.mask[encoder.name], mask)


def test_windows_and_captions_tell_their_rate_and_a_clip_that_of_most(settings: DataSettings, tmp_path: Path) -> None:
    """A bucket of fixed rate, and one that squeezes both scenes: 36 frames at 15 a second, 12 of them."""
    buckets = BucketSettings(), BucketSettings(frames=16, squeeze_from_s=0.5)
    cache = build(replace(settings, buckets=buckets), tmp_path / "cache")
    fixed, squeezed = (windows.train for windows in cache.buckets)
    assert fixed.scenes == ["up"] * 7 + ["short"] * 2 and set(fixed.frame_rates) == {Fraction(15)}
    assert squeezed.scenes == ["short"] and squeezed.frame_rates == [Fraction(20)]
    assert cache.frame_rate == 15
    assert squeezed[0].caption == "FPS-20 It waits." and squeezed[0].frame_rate == 20
    for name, encoder in zip(("words", "letters"), ENCODERS, strict=True):
        assert torch.equal(squeezed[0].text[name], encoder.encode("FPS-20 It waits.")[0])
    frames = read_frames(tmp_path / "clips" / "a.mp4", 16, 16)
    assert torch.equal(squeezed[0].latent, CODEC.encode(frames[[38 + k * 12 // 16 for k in range(16)]]))
    assert fixed.captions == {"up": "FPS-15 It brightens.", "short": "FPS-15 It waits."}


def test_a_bad_clip_is_skipped_and_written_down_up_to_a_share(
    settings: DataSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Taken whole, damaged videos are trained on as grey smears; and skipped in silence, a broken disk is no data."""
    whole = (tmp_path / "clips/a.mp4").read_bytes()
    (tmp_path / "clips/b.mp4").write_bytes(whole[: len(whole) // 2])
    settings.captions.write_text(CAPTIONS + "- {name: bad, file: b.mp4, first_frame: 0, last_frame: 9, caption: x}\n")
    path = build(replace(settings, bad_share=0.5), tmp_path / "cache")
    (said,) = json.loads((tmp_path / "cache" / SKIPPED_FILE).read_text())
    assert said["file"] == str(tmp_path / "clips/b.mp4") and "cannot be decoded" in said["reason"]
    assert said.keys() == {"file", "time_s", "reason"}
    assert "1 of 2 clips are skipped" in capsys.readouterr().err
    assert set(opened(path).train.scenes) == {"up", "short"}
    too_many = r"1 of 2 clips cannot be trained on, and data\.bad_share is 0\.4: .*b\.mp4: it cannot be decoded"
    for cache in ("cache", "new"):  # also where it was built under another limit
        with pytest.raises(CinemeshError, match=too_many):
            build(replace(settings, bad_share=0.4), tmp_path / cache)
    assert (tmp_path / "new" / SKIPPED_FILE).exists()
    (tmp_path / "clips/b.mp4").write_bytes(whole)
    assert "bad" in opened(build(replace(settings, bad_share=0.0), tmp_path / "cache")).train.scenes
    assert not (tmp_path / "cache" / SKIPPED_FILE).exists()
    (tmp_path / "clips/a.mp4").unlink()
    (tmp_path / "clips/a.mp4").symlink_to("nowhere")
    (tmp_path / "clips/b.mp4").write_bytes(b"")
    with pytest.raises(CinemeshError, match="2 of 2 clips cannot be trained on"):
        build(replace(settings, bad_share=1.0), tmp_path / "cache")


def test_a_scene_of_no_file_is_named(settings: DataSettings, tmp_path: Path) -> None:
    settings.captions.write_text(CAPTIONS.replace("a.mp4", "c.mp4"))
    with pytest.raises(CinemeshError, match=r"scene up needs c\.mp4.*\(a\.mp4\)"):
        build(settings, tmp_path)


def test_each_bucket_has_windows_of_its_shape(settings: DataSettings, tmp_path: Path) -> None:
    """A scene too short for one bucket is in the others; frames are scaled and cropped to each, never squeezed."""
    buckets = (BucketSettings(), BucketSettings(frames=16, width=24), BucketSettings(frames=9, height=8))
    cache = build(replace(settings, buckets=buckets), tmp_path / "cache")
    assert [samples.bucket for samples in cache.buckets] == ["8x16x16", "16x16x24", "9x8x16"]
    assert [shape_of(samples) for samples in cache.buckets] == [(16, 1, 2, 2), (16, 2, 2, 3), (16, 2, 1, 2)]
    # 36 frames, 16 held out for the longest bucket: training windows end below frame 20, validation starts there.
    starts = {
        "8x16x16": ([0, 3, 6, 9, 12], [0, 3], [20, 23, 26]),
        "16x16x24": ([0, 3], [], [20]),
        "9x8x16": ([0, 3, 6, 9], [0, 3], [20, 23, 26]),
    }
    ids: list[int] = []
    for samples in cache.buckets:
        frames, height, width = map(int, samples.bucket.split("x"))
        pixels = read_frames(tmp_path / "clips" / "a.mp4", height, width)
        up, short, held = starts[samples.bucket]
        train = [*(("up", 2 + first) for first in up), *(("short", 38 + first) for first in short)]
        assert [(s.scene, s.first_frame) for s in samples.train] == train
        assert [(s.scene, s.first_frame) for s in samples.validation] == [("up", 2 + first) for first in held]
        for sample in (*samples.train, *samples.validation):
            window = pixels[sample.first_frame : sample.first_frame + frames]
            assert torch.equal(sample.latent, CODEC.encode(window))
            ids.append(sample.id)
    assert sorted(ids) == list(range(len(ids)))


def test_the_quick_start_data_are_normalised_and_complete(tmp_path: Path) -> None:
    """The real clips: codec constants that no longer fit the clips or the scaling show here."""
    settings = DataSettings(fps=25, stride=8)
    cache = opened(build(settings, tmp_path))
    assert shape_of(cache) == (16, 2, 16, 16)
    assert len({sample.scene for sample in cache.train}) == 7
    assert len({sample.scene for sample in cache.validation}) == 6  # the bus has 30 frames
    scenes: dict[str, list[Tensor]] = {}
    for sample in cache.train:
        scenes.setdefault(sample.scene, []).append(sample.latent)
    # Each scene weighs the same, as when the constants were measured. Fewer windows than then, and
    # means of up to 0.08 taken as zero: hence the bounds.
    moments = [torch.stack(v).transpose(0, 1).flatten(1) for v in scenes.values()]
    mean = torch.stack([m.mean(1) for m in moments]).mean(0)
    std = (torch.stack([m.square().mean(1) for m in moments]).mean(0) - mean.square()).sqrt()
    assert mean.abs().max() < 0.15
    assert ((std - 1).abs() < 0.1).all()


def test_a_cache_is_reused_until_what_it_is_made_of_changes(
    settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stale latents or embeddings would train the wrong model in silence."""

    def made(**changes: object) -> bool:
        """Whether building with these changes encoded windows, or captions; then build as before again."""
        before = units()
        build_version(replace(settings, **changes), Encoding(BlockDCT(), CODEC, encoders), tmp_path, progress=False)
        return units() != before

    def units() -> set[Path]:
        return {*(tmp_path / "latents").iterdir(), *(tmp_path / "captions").iterdir()}

    encoders = ENCODERS
    first = build(settings, tmp_path).name
    assert not made()
    more = {"buckets": (BucketSettings(), BucketSettings(frames=16))}
    for changes in (
        {"stride": 2}, {"frames": 9}, {"size": 24}, {"validation_share": 0.5}, {"fps": 16}, more,
        {"frames": 16, "buckets": (BucketSettings(frames=8), BucketSettings(squeeze_from_s=0.5))},
    ):  # fmt: skip
        assert made(**changes), changes
        assert not made(**changes) and not made()  # what was there stays
    assert not made(buckets=(BucketSettings(frames=8, weight=3.0),))  # the same windows, and nothing else counts
    encoders = (ByteEncoder(6, 13, "words"), ENCODERS[1])
    assert made() and not made()
    encoders = ENCODERS[::-1]
    assert made() and not made()
    encoders = ENCODERS
    assert build(settings, tmp_path).name == first
    with monkeypatch.context() as patch:
        patch.setattr(BlockDCTCodec, "fingerprint", "another")
        assert made() and not made()
        assert build(settings, tmp_path).version.codec == "another"
    settings.captions.write_text(CAPTIONS.replace("brightens", "glows"))
    latents = {*(tmp_path / "latents").iterdir()}
    assert made() and not made()
    assert {*(tmp_path / "latents").iterdir()} == latents  # a caption that is written anew encodes no window
    write_mp4(tmp_path / "clips" / "a.mp4", torch.zeros(50, 16, 16, 3, dtype=torch.uint8), Fraction(15))
    assert made() and not made()


def test_a_cache_of_an_earlier_release_is_left_where_it_is(
    settings: DataSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").mkdir()
    old = tmp_path / "cache" / OLD_FILE
    old.write_bytes(b"days of work")
    assert len(opened(build(settings, tmp_path / "cache")).train) == 9
    assert old.read_bytes() == b"days of work"
    assert f"{old} is the latent cache of an earlier release and is not read" in capsys.readouterr().err


@pytest.mark.parametrize("after", [0, 1, 3, 9])
def test_a_failed_build_keeps_whole_units_alone(
    settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """A full disk after some members."""
    whole, count = TarWriter.add, 0

    def fill_disk(self: TarWriter, data: bytes) -> tuple[int, int]:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(28, "No space left on device")
        return whole(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(TarWriter, "add", fill_disk)
        with pytest.raises(CinemeshError, match=r"cannot write .*(captions|latents)/.* No space left"):
            build(settings, tmp_path / "cache")
    left = [path for path in (tmp_path / "cache").rglob("*") if path.name.endswith(".part")]
    assert left == [] and not (tmp_path / "cache" / "versions").exists()
    assert build(settings, tmp_path / "cache").name == build(settings, tmp_path / "other").name


def test_nan_is_named_when_built(settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockDCTCodec, "encode", lambda self, frames: torch.full((1,), math.inf))
    with pytest.raises(CinemeshError, match="latent of scene up at frame 2 holds 1 values"):
        build(settings, tmp_path)
    monkeypatch.setattr(ByteEncoder, "encode", lambda self, caption: (torch.tensor(math.nan), 0))
    with pytest.raises(CinemeshError, match="words embedding of the caption of scene up"):
        build(settings, tmp_path / "new")


def test_others_may_read_a_cache_if_the_umask_lets_them(settings: DataSettings, tmp_path: Path) -> None:
    build(settings, tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "clips" not in path.parts]
    assert len(files) > 8 and all(path.stat().st_mode & 0o777 == 0o666 & ~UMASK for path in files)


def test_settings_that_cannot_be_met_give_their_numbers(settings: DataSettings, tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match=r"scene short lasts 0\.8 s, .*: 13 frames at 15 frames/s, 0\.867 s"):
        build(replace(settings, frames=13), tmp_path)
    with pytest.raises(CinemeshError, match=r"height\(20\) % 8 = 4 in 8x20x20"):
        build(replace(settings, size=20), tmp_path)
    with pytest.raises(CinemeshError, match=r"data\.stride is 0"):
        replace(settings, stride=0)
    with pytest.raises(CinemeshError, match=r"validation_share is 1\.0"):
        replace(settings, validation_share=1.0)
    with pytest.raises(CinemeshError, match=r"37x16x16 needs 37 frames at 15.* \(the longest, up, lasts 2\.4 s\)"):
        build(replace(settings, buckets=(BucketSettings(), BucketSettings(frames=37))), tmp_path)
    with pytest.raises(CinemeshError, match=r"validation_share is -0\.1"):
        replace(settings, validation_share=-0.1)
    for name in ("frames", "height", "width"):
        with pytest.raises(CinemeshError, match=f"{name} is 0"):
            replace(Bucket(1, 1, 1, 1.0), **{name: 0})
    for weight in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(CinemeshError, match=f"weight is {weight}"):
            Bucket(1, 1, 1, weight)


def test_more_windows_than_ids_have_bits_are_refused_before_any_is_encoded(
    settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample 2**32 + 5 would draw what sample 5 draws; of long videos there is no other limit."""
    monkeypatch.setattr(rules, "MOST_IDS", 10)
    assert len(opened(build(settings, tmp_path / "cache")).train) == 9  # and one of validation
    monkeypatch.setattr(rules, "MOST_IDS", 9)
    monkeypatch.setattr(BlockDCTCodec, "encode", None)
    cut = r"stride\(3\) and 1 bucket.* cut 10 windows .*: at most 9; raise"
    with pytest.raises(CinemeshError, match=cut):
        build(settings, tmp_path / "new")


def test_settings_at_their_limits_are_met(settings: DataSettings) -> None:
    """As long as the shortest scene, as long as the longest, and the least of each number."""
    assert len(replace(settings, frames=12).scenes()) == 2
    assert len(replace(settings, buckets=(BucketSettings(), BucketSettings(frames=36))).scenes()) == 2
    least = replace(settings, size=1, frames=1, stride=1, validation_share=0.0)
    assert least.shapes == (Bucket(1, 1, 1, 1.0, fps=15),)


def test_data_ranks_share_a_micro_batch_in_order(settings: DataSettings, tmp_path: Path) -> None:
    cache = opened(build(settings, tmp_path))
    picked = [8, 0, 3, 3, 5, 1]
    parts = [collate(cache.train.select(picked), rank, 3, first_place=12) for rank in range(3)]
    assert torch.cat([part[IDS] for part in parts]).tolist() == picked
    assert torch.cat([part[PLACES] for part in parts]).tolist() == [12, 13, 14, 15, 16, 17]
    assert parts[0][IDS].dtype == parts[0][PLACES].dtype == torch.int64
    for part in parts:
        words, letters = text_input("words"), text_input("letters")
        assert {name: list(t.shape) for name, t in part.items()} == {
            IDS: [2],
            PLACES: [2],
            LATENTS: [2, 16, 1, 2, 2],
            MASK: [2, 17],
            words: [12, 2, 6],
            letters: [5, 2, 4],
        }
        assert part[MASK].dtype == torch.bool
        for place, sample_id in enumerate(part[IDS].tolist()):
            sample = cache.train[sample_id]
            assert torch.equal(part[LATENTS][place], sample.latent)
            assert torch.equal(part[letters][:, place], sample.text["letters"])
            assert torch.equal(part[MASK][place, :12], sample.mask["words"])
            assert torch.equal(part[MASK][place, 12:], sample.mask["letters"])
    with pytest.raises(CinemeshError, match=r"micro-batch\(6\) % data ranks\(4\) = 2"):
        collate(cache.train.select(picked), 0, 4)


def test_a_rank_reads_only_its_own_samples(settings: DataSettings, tmp_path: Path) -> None:
    """Else every data rank would read the whole global batch from a shared disk."""
    samples = list(opened(build(settings, tmp_path)).train)
    read: list[int] = []

    class Watched(Sequence[Sample]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: slice) -> list[Sample]:  # type: ignore[override]
            read.extend(range(6)[index])
            return samples[index]

    collate(Watched(), 1, 3)
    assert read == [2, 3]


def test_a_slice_of_samples_reads_as_the_same_samples(settings: DataSettings, tmp_path: Path) -> None:
    cache = opened(build(settings, tmp_path))
    assert [sample.id for sample in cache.train[2:6:2]] == [2, 4]
    assert cache.train[-1].id == len(cache.train) - 1
    with pytest.raises(IndexError):
        cache.train[len(cache.train)]


def test_scenes_name_the_scene_of_every_sample(settings: DataSettings, tmp_path: Path) -> None:
    train = opened(build(settings, tmp_path / "cache")).train
    assert train.scenes == [sample.scene for sample in train]
    assert train.select([7, 0]).scenes == ["short", "up"]
