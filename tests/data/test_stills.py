"""Images as people see them: each way of writing one ends in its pixels, or in a reason that names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from odd_images import OddImage, check_image, encoded, odd_images, quarters
from PIL import Image, ImageCms, ImageOps

from cinemesh.data import stills
from cinemesh.data.buckets import BucketSettings
from cinemesh.data.cache.building import SKIPPED_FILE, build_cache
from cinemesh.data.cache.samples import Cache
from cinemesh.data.codec import BlockDCTCodec
from cinemesh.data.encoding import BlockDCT, Encoding
from cinemesh.data.settings import DataSettings
from cinemesh.data.text import ByteEncoder
from cinemesh.errors import CinemeshError

ODD = {odd.name: odd for odd in odd_images()}


def test_there_are_a_hundred_and_more() -> None:
    assert len(ODD) == len([*odd_images()]) > 100


@pytest.mark.parametrize(
    "odd", [pytest.param(odd, id=name.encode("ascii", "replace").decode()) for name, odd in ODD.items()]
)
def test_an_odd_image_comes_to_its_pixels_or_a_skip(tmp_path: Path, odd: OddImage) -> None:
    """What Pillow gives and what people see are not the same; nothing else looks at the difference."""
    assert check_image(odd, tmp_path) == ("pixels" if odd.seen is not None else "skipped")


@pytest.mark.parametrize(
    ("name", "where", "what", "planted"),
    [
        ("turned 6.png", ImageOps, "exif_transpose", lambda image: image),
        ("deep.png", stills, "SIXTEEN_BITS", ()),
        ("linear.png", ImageCms, "profileToProfile", lambda image, *_, **__: image),
        ("adobe.jpg", stills, "ADOBE_RGB", "R00"),
        ("gamma.png", stills, "SRGB_GAMMA", 1.0),
    ],
)
def test_an_odd_image_fails_without_its_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: object, what: str, planted: object
) -> None:
    """Each rule taken away: the check above must see it."""
    monkeypatch.setattr(where, what, planted)
    with pytest.raises(AssertionError):
        check_image(ODD[name], tmp_path)


def test_images_are_clips_of_one_frame_beside_videos_and_bad_ones_are_skipped(tmp_path: Path) -> None:
    """Cropped and scaled as a video's frame; a caption without a rate; a bucket of more frames takes none."""
    clips = tmp_path / "clips"
    clips.mkdir()
    Image.fromarray(quarters()).save(clips / "a.PNG")
    (clips / "b.jpg").write_bytes(encoded(Image.fromarray(quarters()), "JPEG")[:-300])
    rows = [f"{{name: {n}, file: {f}, first_frame: 0, last_frame: 0, caption: A {n}.}}" for n, f in CAPTIONED.items()]
    (tmp_path / "captions.yaml").write_text(f"[{', '.join(rows)}]", encoding="utf-8")
    buckets = (BucketSettings(frames=1, height=16, width=16), BucketSettings(frames=1, height=16, width=24))
    settings = DataSettings((str(clips),), tmp_path / "captions.yaml", buckets=buckets, bad_share=0.5)
    codec = BlockDCTCodec()
    encoding = Encoding(BlockDCT(), codec, (ByteEncoder(4, 12, "x"),))
    square, wide = Cache.open(
        str(tmp_path / "cache"), build_cache(settings, encoding, tmp_path / "cache", False)
    ).buckets
    assert [s.scene for s in square.train] == ["picture"] and not len(square.validation)
    assert (wide.train[0].caption, wide.train[0].latent.shape) == ("A picture.", (16, 1, 2, 3))
    shown = np.asarray(Image.fromarray(quarters()).resize((24, 16), Image.Resampling.BILINEAR))
    assert torch.equal(wide.train[0].latent, codec.encode(torch.from_numpy(shown.copy())[None]))
    assert "b.jpg" in (tmp_path / "cache" / SKIPPED_FILE).read_text(encoding="utf-8")
    (tmp_path / "captions.yaml").write_text(f"[{rows[0].replace('last_frame: 0', 'last_frame: 5')}]", encoding="utf-8")
    with pytest.raises(CinemeshError, match=r"scene picture ends at frame 5, and .*a\.PNG is an image"):
        build_cache(settings, encoding, tmp_path / "cache", False)


CAPTIONED = {"picture": "a.PNG", "broken": "b.jpg"}
