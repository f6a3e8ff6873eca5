"""Scorers and embedders of the user's weights, against what their networks give when they are asked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from planted_clips import scene
from torch import nn

from cinemesh.data.curate.camera import CLASSES, CameraMeasure, CameraSettings
from cinemesh.data.curate.copies import Copies
from cinemesh.data.curate.embedders import EmbedderSettings
from cinemesh.data.curate.pictures import encode
from cinemesh.data.curate.scorers import ScoreLimits, ScoreMeasure, ScorerSettings
from cinemesh.data.curate.settings import presets, settings_of
from cinemesh.errors import CinemeshError


def row() -> dict[str, Any]:
    return {"id": "a", "samples": [encode(Image.fromarray(frame), 95) for frame in scene("taxi")[:3]]}


def scored(settings: ScorerSettings) -> float:
    settings.check("measure.scores.x")
    return ScoreMeasure(settings, settings.fingerprint).of([row()])[0]["score"]


def test_laions_head_is_applied_to_clips_vectors(clip: Path, tmp_path: Path) -> None:
    """The layers of the published predictor, between which only dropout stands."""
    torch.manual_seed(1)
    head = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.2), nn.Linear(6, 1)).eval()
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, tmp_path / "head.pth")
    vectors = (
        EmbedderSettings("clip", str(clip)).build().pictures([Image.open(_file(data)) for data in row()["samples"]])
    )
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with torch.no_grad():
        wanted = float(head(torch.from_numpy(vectors)).mean())
    assert scored(ScorerSettings("laion", str(tmp_path / "head.pth"), str(clip))) == pytest.approx(wanted, abs=1e-5)


def _file(data: bytes) -> Any:
    import io

    return io.BytesIO(data)


def test_clips_vectors_are_the_models_own(clip: Path) -> None:
    from cinemesh.data.curate.embedders import CLIP_PIXELS, pixels

    image = Image.fromarray(scene("taxi")[0]).crop((184, 0, 456, 272))
    model: Any = transformers.CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        states = model.vision_model(pixel_values=pixels([image], 32, 32, CLIP_PIXELS)).pooler_output
        wanted = torch.nn.functional.normalize(model.visual_projection(states), dim=-1)
    found = EmbedderSettings("clip", str(clip)).build().pictures([Image.fromarray(scene("taxi")[0])])
    assert np.allclose(found, wanted.numpy(), atol=1e-5)


def test_words_score_pictures(clip: Path) -> None:
    both = [
        ScorerSettings("clip", clip=str(clip), texts=(a,), against=(b,))
        for a, b in (("slide", "photo"), ("photo", "slide"))
    ]
    assert sum(scored(each) for each in both) == pytest.approx(1, abs=1e-5)
    assert EmbedderSettings("clip", str(clip)).build().texts(["a slide", "a photo"]).shape == (2, 8)


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3))], 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_network_scores_and_embeds(tmp_path: Path) -> None:
    torch.jit.script(Mean()).save(str(tmp_path / "net.pt"))
    first, second = (scored(ScorerSettings("torchscript", str(tmp_path / "net.pt"), px=32, output=n)) for n in (0, 1))
    assert first < second
    with pytest.raises(CinemeshError, match="gives 2 numbers"):
        scored(ScorerSettings("torchscript", str(tmp_path / "net.pt"), px=32, output=2))
    vectors = EmbedderSettings("sscd", str(tmp_path / "net.pt")).build().pictures([Image.fromarray(scene("taxi")[0])])
    assert vectors.shape == (1, 2) and np.linalg.norm(vectors) == pytest.approx(1)


def test_the_largest_object_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind: Any = transformers.YolosConfig
    config = kind(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=[64, 64],
        patch_size=16, num_detection_tokens=4, num_labels=3,
    )  # fmt: skip
    model: Any = transformers.YolosForObjectDetection(config).eval()
    with torch.no_grad():  # it is sure of everything, and every box is the same
        model.class_labels_classifier.layers[-1].bias.copy_(torch.tensor([20.0, 0, 0, 0]))
        model.bbox_predictor.layers[-1].weight.zero_()
        model.bbox_predictor.layers[-1].bias.copy_(torch.logit(torch.tensor([0.5, 0.5, 0.4, 0.25])))
    model.save_pretrained(tmp_path / "detector")
    assert scored(ScorerSettings("detector", str(tmp_path / "detector"), px=64)) == pytest.approx(0.1, abs=1e-4)


def test_light_scorers_order_pictures() -> None:
    from cinemesh.data.curate.scorers import colour, contrast, sharpness

    picture = scene("taxi")[0].astype(float)
    soft = np.asarray(Image.fromarray(scene("taxi")[0]).reduce(4).resize((640, 272)), float)
    grey = np.repeat(picture.mean(2, keepdims=True), 3, 2)
    assert sharpness(soft) < sharpness(picture) / 2
    assert contrast(picture / 2) == pytest.approx(contrast(picture) / 2)
    assert colour(grey) == pytest.approx(0, abs=1e-6) and colour(picture) > 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_camera_classifier_names_its_classes(tmp_path: Path) -> None:
    class Arc(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            told = torch.zeros(x.shape[0], 16)
            told[:, 12] = 5.0
            return told

    torch.jit.script(Arc()).save(str(tmp_path / "net.pt"))
    measure = CameraMeasure(CameraSettings("torchscript", str(tmp_path / "net.pt"), px=32), "w")
    found = measure.of([row()])[0]
    assert found["camera"] == CLASSES[12] == "arc"
    assert found["camera_confidence"] == pytest.approx(np.exp(5) / (np.exp(5) + 15), abs=1e-4)


@pytest.mark.parametrize("name", presets())
def test_a_preset_asks_for_weights_or_runs_with_what_ships(name: str) -> None:
    if name == "small":
        settings_of({"preset": name, "sources": ["x"]}, "c.yaml")
        return
    with pytest.raises(CinemeshError, match="TorchScript file of SSCD"):
        settings_of({"preset": name, "sources": ["x"]}, "c.yaml")
    shipped = {
        "measure": {"copies": {"kind": "efficientnet"}},
        **{
            kind: {
                "copies": {"embedder": "efficientnet", "cosine": 0.95},
                "scores": {"aesthetic": None, "subject": None},
                "humans": None,
                "neighbours": None,
            }
            for kind in ("videos", "images")
        },
    }
    settings = settings_of({"preset": name, "sources": ["x"], **shipped}, "c.yaml")
    assert settings.reading and settings.cut.least_s in (4, 12, 10.6)


def test_a_limit_of_another_scorer_is_refused() -> None:
    with pytest.raises(CinemeshError, match="belongs to an embedder"):
        settings_of({"preset": "small", "sources": ["x"], "videos": {"copies": {"embedder": "sscd"}}}, "c.yaml")
    given = {
        "measure": {"scores": {"a": {"kind": "contrast"}}},
        "videos": {"scores": {"a": {"scorer": "laion", "least": 4}}},
    }
    with pytest.raises(CinemeshError, match="limits belong to a scorer"):
        settings_of({"preset": "small", "sources": ["x"], **given}, "c.yaml")


def test_a_limit_may_be_zero_or_less() -> None:
    """A clip scorer tells how much more a clip is like one text than like another: 0 is where to begin."""
    for least in (0, -0.25):
        given = {
            "measure": {"scores": {"a": {"kind": "contrast"}}},
            "videos": {"scores": {"a": {"scorer": "contrast", "least": least}}},
        }
        limits = settings_of({"preset": "small", "sources": ["x"], **given}, "c.yaml").videos.scores["a"]
        assert limits is not None and limits.least == least


def test_limits_have_two_ends() -> None:
    limits = ScoreLimits("contrast", least=10, most=20)
    assert [limits.wrong(value) is None for value in (9.9, 10, 20, 20.1)] == [False, True, True, False]


def test_copies_of_copies_are_no_chain() -> None:
    """b is like a, c like b, but not like a: c stays."""
    angles = {"a": 0.0, "b": 0.25, "c": 0.5}
    vectors = {each: np.array([np.cos(t), np.sin(t)], np.float32) for each, t in angles.items()}
    rows = [{"id": each, "file": each, "width": 10, "height": 10, "seconds": 1.0} for each in angles]
    assert [*Copies(cosine=0.95, embedder="x").dropped(rows, vectors, {})] == ["b"]
