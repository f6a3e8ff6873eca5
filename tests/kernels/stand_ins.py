"""Stand-ins for flash-attn, apex and torch's CUDA kernels: their own signatures, with bodies of ours.

They check layout and arguments as the originals document them, and compute with the reference, so that a transposed
tensor or a swapped argument is a wrong number.
"""

# The originals' signatures, without their types.
# ruff: noqa: ANN001, ANN201, ANN205

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from cinemesh.kernels.reference import REFERENCE

IN_ORDER: list[bool] = []  # for each backward since this was cleared, whether it was asked to sum in one fixed order


# The bodies are ours. flash-attn 2.8.3.post2 (its sdist on PyPI), flash_attn/flash_attn_interface.py.


def attention_of(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """[B, T, H, K] in and out; log-sum-exp [B, H, T]."""
    assert q.shape[0] == k.shape[0] == v.shape[0] and q.shape[2:] == k.shape[2:] == v.shape[2:]
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert scale == pytest.approx(q.shape[-1] ** -0.5)
    o, lse = torch.empty_like(q.transpose(0, 1)), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    REFERENCE["attention"]((q.transpose(0, 1), torch.stack((k, v), 2).transpose(0, 1)), (o, lse))
    return o.transpose(0, 1), lse


def gradients_of(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, out: tuple[Any, Any, Any], scale: float | None
) -> None:
    assert scale == pytest.approx(q.shape[-1] ** -0.5)
    rows = [x.transpose(0, 1) for x in (do, q)]
    kv = torch.stack((k, v), 2).transpose(0, 1)
    dq, dkv = torch.empty_like(rows[1]), torch.empty_like(kv)
    REFERENCE["attention_backward"]((*rows, kv, o.transpose(0, 1), lse), (dq, dkv))
    for view, gradient in zip(out, (dq, dkv[:, :, 0], dkv[:, :, 1]), strict=True):
        view.copy_(gradient.transpose(0, 1))


class FlashAttention2:
    @staticmethod
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert alibi_slopes is None and not return_softmax
        return *attention_of(q, k, v, softmax_scale), None, None

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert alibi_slopes is None
        IN_ORDER.append(deterministic)
        gradients_of(dout, q, k, v, out, softmax_lse, (dq, dk, dv), softmax_scale)


# flash_attn_3 3.0.0, github.com/Dao-AILab/flash-attention at 0251105a2fb1, hopper/flash_attn_interface.py: a custom op
# that returns o, so that o may not be one of its arguments.


class FlashAttention3:
    @staticmethod
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        assert k_new is None and v_new is None and qv is None and out_ is None and cu_seqlens_q is None
        return *attention_of(q, k, v, softmax_scale), None, None

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert cu_seqlens_q is None and not is_causal
        IN_ORDER.append(deterministic)
        gradients_of(dout, q, k, v, out, softmax_lse, (dq, dk, dv), softmax_scale)


# flash-attn-4 4.0.0b36 (its wheel on PyPI), flash_attn/cute/interface.py. Only what stands before the last argument
# that the adapter gives; outputs must have 16-byte aligned rows.


class FlashAttention4:
    @staticmethod
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
        block_sparse_tensors=None, return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        assert not causal and out is not None and lse is not None and lse.is_contiguous()
        assert out.stride(-1) == 1 and all(step * out.element_size() % 16 == 0 for step in out.stride()[:-1])
        found, logsumexp = attention_of(q, k, v, softmax_scale)
        out.copy_(found)
        lse.copy_(logsumexp)

    @staticmethod
    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        assert not causal
        IN_ORDER.append(deterministic)
        gradients_of(dout, q, k, v, out, lse, (dq, dk, dv), softmax_scale)


# NVIDIA/apex at 6424da3b4faa, csrc/layer_norm_cuda.cpp and csrc/amp_C_frontend.cpp: positional arguments only.


class FusedLayerNorm:
    @staticmethod
    def rms_forward_affine(input, normalized_shape, gamma, epsilon, /):
        assert list(normalized_shape) == list(gamma.shape) and input.dtype == gamma.dtype
        inverse = (input.float().pow(2).mean(-1) + epsilon).rsqrt()
        return (input * inverse[..., None] * gamma).to(input.dtype), inverse.view(-1)

    @staticmethod
    def forward_affine(input, normalized_shape, gamma, beta, epsilon, /):
        assert list(normalized_shape) == list(gamma.shape) and input.dtype == gamma.dtype == beta.dtype
        mean = input.float().mean(-1)
        inverse = (input.float().var(-1, unbiased=False) + epsilon).rsqrt()
        normed = (input - mean[..., None]) * inverse[..., None] * gamma + beta
        return normed.to(input.dtype), mean.view(-1), inverse.view(-1)

    @staticmethod
    def backward_affine(
        dout, mean, invvar, input_or_output, normalized_shape, gamma, beta, epsilon, memory_efficient, /
    ):
        assert not memory_efficient and mean.dim() == invvar.dim() == 1 and dout.dtype == input_or_output.dtype
        assert list(normalized_shape) == list(gamma.shape)
        rows = dout.shape[:-1]
        found = torch.empty_like(input_or_output), torch.empty_like(gamma), torch.empty_like(beta)
        inputs = dout, input_or_output, mean.view(rows), invvar.view(rows), gamma
        REFERENCE["layer_norm_backward"](inputs, found)
        return found


class AmpC:
    @staticmethod
    def multi_tensor_adam_capturable(
        chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay,
        inv_scale, /,
    ):  # fmt: skip
        assert chunk_size > 0 and noop_flag.dtype == step.dtype == torch.int32 and bias_correction == 1 and mode == 1
        assert lr.dtype == inv_scale.dtype == torch.float32
        if int(noop_flag) == 1:
            return
        for g, p, m, v in zip(*tensor_lists, strict=True):
            g.mul_(inv_scale)  # as the kernel does
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).add_(g * g, alpha=1 - beta2)
            unbiased = m / (1 - beta1 ** int(step))
            denominator = (v / (1 - beta2 ** int(step))).sqrt() + epsilon
            p.sub_(lr * (unbiased / denominator + weight_decay * p))


STAND_INS: dict[str, type] = {
    "flash_attn.flash_attn_interface": FlashAttention2,
    "flash_attn_interface": FlashAttention3,
    "flash_attn.cute.interface": FlashAttention4,
    "fused_layer_norm_cuda": FusedLayerNorm,
    "amp_C": AmpC,
}


# Operators of ATen that have kernels for CUDA alone (torch 2.13). Registered for the CPU, they are called through the
# dispatcher, which holds every call to the operator's schema.


def note_order() -> None:
    """Torch's kernels look at the global switch, and ignore one that only warns."""
    asked, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    IN_ORDER.append(asked and not only_warns)


def flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None
):  # fmt: skip
    """[B, T, H, K]; log-sum-exp [B, H, T]."""
    assert cum_seq_q is None and cum_seq_k is None and not dropout_p and not is_causal and not return_debug_mask
    assert (max_q, max_k) == (query.shape[1], key.shape[1])
    o, lse = attention_of(query, key, value, scale or query.shape[-1] ** -0.5)
    nothing = torch.empty(0)
    return o, lse, torch.empty(2, dtype=torch.uint64), nothing, nothing


def flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None,
):  # fmt: skip
    assert not dropout_p and not is_causal
    note_order()
    assert (max_q, max_k) == (query.shape[1], key.shape[1])
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    gradients_of(grad_out, query, key, value, out, logsumexp, found, scale or query.shape[-1] ** -0.5)
    return found


def cudnn_forward(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
    scale=None,
):  # fmt: skip
    """[B, H, T, K]; log-sum-exp [B, H, T, 1]."""
    assert attn_bias is None and compute_log_sumexp and not dropout_p and not is_causal and not return_debug_mask
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    o, lse = attention_of(q, k, v, scale or query.shape[-1] ** -0.5)
    nothing = torch.empty(0)
    counts = query.shape[2], key.shape[2]
    return o.transpose(1, 2), lse[..., None], nothing, nothing, *counts, nothing, nothing, nothing


def cudnn_backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
    max_k, dropout_p, is_causal, *, scale=None,
):  # fmt: skip
    assert attn_bias is None and cum_seq_q is None and cum_seq_k is None and not dropout_p and not is_causal
    assert philox_seed.dtype == philox_offset.dtype == torch.int64 and (max_q, max_k) == (query.shape[2], key.shape[2])
    assert logsumexp.shape == (*query.shape[:3], 1) and logsumexp.is_contiguous()
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    do, q, k, v, o, dq, dk, dv = (x.transpose(1, 2) for x in (grad_out, query, key, value, out, *found))
    gradients_of(do, q, k, v, o, logsumexp[..., 0], (dq, dk, dv), scale or query.shape[-1] ** -0.5)
    return found


def valid_keys(bias: Tensor) -> Tensor:
    """[B, S] of an additive bias [B, H, T, S] of 0 and -inf, whose rows must start at 16 bytes and be alike."""
    assert all(step * bias.element_size() % 16 == 0 for step in bias.stride()[:3])
    assert bool(((bias == 0) | (bias == -torch.inf)).all()) and torch.equal(bias, bias[:, :1, :1].expand_as(bias))
    return bias[:, 0, 0] == 0


def tokens_first(x: Tensor) -> Tensor:
    """[B, H, T, K] -> [T, B, H, K]."""
    return x.permute(2, 0, 1, 3)


def efficient_forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    """[B, H, T, K]; log-sum-exp [B, H, T padded to 32], garbage in the padding."""
    assert compute_log_sumexp and not dropout_p and not is_causal and scale is None
    q, kv = tokens_first(query), torch.stack((tokens_first(key), tokens_first(value)), 2)
    o, lse = torch.empty_like(q), torch.empty(*query.shape[:3])
    REFERENCE["cross_attention"]((q, kv, valid_keys(attn_bias)), (o, lse))
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.nan)
    return o.permute(1, 2, 0, 3), padded, torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)


def efficient_backward(
    grad_out_, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p, grad_input_mask,
    is_causal=False, *, scale=None,
):  # fmt: skip
    """Gradients [B, H, T, K]. The padding of the log-sum-exp must be infinite: its rows then weigh nothing."""
    assert not dropout_p and not is_causal and scale is None and list(grad_input_mask) == [True, True, True, False]
    note_order()
    tokens = query.shape[2]
    assert logsumexp.shape[-1] % 32 == 0 and bool((logsumexp[..., tokens:] == torch.inf).all())
    do, q, o = (tokens_first(x) for x in (grad_out_, query, out))
    kv = torch.stack((tokens_first(key), tokens_first(value)), 2)
    dq, dkv = torch.empty_like(q), torch.empty_like(kv)
    inputs = (do, q, kv, o, logsumexp[..., :tokens], valid_keys(attn_bias))
    REFERENCE["cross_attention_backward"](inputs, (dq, dkv))
    dq, dk, dv = (x.permute(1, 2, 0, 3) for x in (dq, dkv[:, :, 0], dkv[:, :, 1]))
    return dq, dk, dv, torch.empty(0)


def wide_mm(self, mat2, out_dtype, *, out):
    assert self.dtype == mat2.dtype == torch.bfloat16 and out.dtype == out_dtype == torch.float32
    return out.copy_(self.float() @ mat2.float())


def wide_addmm(self, mat1, mat2, out_dtype, *, beta=1, alpha=1, out):
    assert mat1.dtype == mat2.dtype == torch.bfloat16 and self.dtype == out.dtype == out_dtype == torch.float32
    return out.copy_(beta * self + alpha * (mat1.float() @ mat2.float()))


ATEN = {
    "_flash_attention_forward": flash_forward,
    "_flash_attention_backward": flash_backward,
    "_scaled_dot_product_cudnn_attention": cudnn_forward,
    "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
    "_scaled_dot_product_efficient_attention": efficient_forward,
    "_scaled_dot_product_efficient_attention_backward": efficient_backward,
    "mm.dtype_out": wide_mm,
    "addmm.dtype_out": wide_addmm,
}


@contextmanager
def aten_on_cpu(**changed: Any) -> Iterator[None]:
    """Torch's CUDA operators run on CPU tensors; ``changed``: other bodies, by name."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for name, body in (ATEN | changed).items():
            library.impl(name, body, "CPU")
        yield
    finally:
        library._destroy()
