"""The one check of what a fast kernel is given: a wrong tensor is an error that names op, tensor, got and wanted.

A Triton or CUDA kernel reads whatever lies behind a pointer, so every launcher checks first. The reference needs none:
torch checks for it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CinemeshError
from .ops import OPS
from .signature import parse
from .spec import POINTER_ALIGNMENT

WORDS = {  # label of the op table -> word of an error
    "t": "tokens",
    "s": "keys",
    "b": "samples",
    "d": "width",
    "h": "heads",
    "k": "head dim",
    "f": "FFN width",
    "l": "text tokens",
    "p": "values of a patch",
    "c": "K,V pair",
    "n": "elements",
}


def check(
    op: str,
    tensors: Mapping[str, tuple[Tensor, str, Sequence[torch.dtype]]],
    *,
    strided: Container[str] = (),
    unaligned: Container[str] = (),
    offered: Mapping[str, Sequence[int]] = {},
) -> dict[str, int]:
    """Sizes by label, when every tensor is what ``op`` can take; else CinemeshError.

    ``tensors``: name -> (tensor, labels of its dims as in the op table, dtypes allowed). A label met twice must have
    one size. ``strided`` names tensors of which only the last dim must be contiguous (slices of larger buffers; their
    rows must then keep the alignment), ``unaligned`` those that need not start at 16 bytes (scalars, masks).
    ``offered``: label -> the sizes that there is a kernel for.
    """
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    place: torch.device | None = None
    for name, (x, labels, dtypes) in tensors.items():
        if x.dtype not in dtypes:
            raise _wrong(op, name, f"dtype {_short(x.dtype)}", " or ".join(map(_short, dtypes)))
        if x.dim() != len(labels):
            raise _wrong(op, name, f"shape {tuple(x.shape)}", f"{len(labels)} dims: {', '.join(map(_word, labels))}")
        place = place or x.device
        if x.device != place:
            raise _wrong(op, name, f"a tensor on {x.device}", f"one on {place} as the others")
        for label, size in zip(labels, x.shape, strict=True):
            if size == 0:
                raise _wrong(op, name, f"shape {tuple(x.shape)}", f"at least one of {_word(label)}")
            if sizes.setdefault(label, size) != size:
                raise _wrong(op, name, f"{size} {_word(label)}", f"{sizes[label]} as in {origin[label]}")
            origin.setdefault(label, name)
            if label in offered and size not in offered[label]:
                raise _wrong(op, name, f"{_word(label)} {size}", " or ".join(map(str, offered[label])))
        if name in strided:
            if labels and x.stride(-1) != 1:
                raise _wrong(op, name, f"strides {x.stride()}", "a contiguous last dim")
            rows = [step * x.element_size() % POINTER_ALIGNMENT for step in x.stride()[:-1]]
            if name not in unaligned and any(rows):
                raise _wrong(op, name, f"strides {x.stride()}", f"rows at multiples of {POINTER_ALIGNMENT} bytes")
        elif not x.is_contiguous():
            raise _wrong(op, name, f"strides {x.stride()} of shape {tuple(x.shape)}", "a contiguous tensor")
        if name not in unaligned and x.data_ptr() % POINTER_ALIGNMENT:
            raise _wrong(
                op,
                name,
                f"an address {x.data_ptr() % POINTER_ALIGNMENT} bytes past a multiple of {POINTER_ALIGNMENT}",
                f"one aligned to {POINTER_ALIGNMENT} bytes, as the arena aligns every buffer",
            )
    return sizes


def labelled(
    op: str,
    names: Sequence[str],
    tensors: Sequence[Tensor],
    dtypes: Mapping[str, Sequence[torch.dtype]],
    otherwise: Sequence[torch.dtype],
) -> dict[str, tuple[Tensor, str, Sequence[torch.dtype]]]:
    """A call's inputs and outputs for :func:`check`, by ``names`` in their order, with the labels of the op table.

    ``dtypes``: allowed, by name, or ``otherwise``.
    """
    signature = parse(OPS[op].signature or "")
    rows = zip(names, tensors, (*signature.inputs, *signature.outputs), strict=True)
    return {name: (x, labels, dtypes.get(name, otherwise)) for name, x, labels in rows}


def _wrong(op: str, name: str, got: str, wanted: str) -> CinemeshError:
    return CinemeshError(f"{op}: {name}: got {got}, wanted {wanted}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _word(label: str) -> str:
    return WORDS.get(label, label)
