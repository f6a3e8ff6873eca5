"""Which implementation runs is decided by the list and said out loud; a wrong tensor or override is an error, in words.

A registry that falls back in silence trains at a tenth of the speed, or on a kernel that nobody asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.kernels import packages, rates, registry, selection, tuning
from cinemesh.kernels.catalogue import IMPLEMENTATIONS, NOT_ASSUMED, OPTIONAL, Implementation, candidates, refusal
from cinemesh.kernels.checks import check
from cinemesh.kernels.ops import LEAVE_SMS, OPS
from cinemesh.kernels.reference import REFERENCE
from cinemesh.kernels.selection import Software, packages_of, select
from cinemesh.kernels.signature import parse

PLAIN, EVERYTHING = Software(), Software(missing={})
OLD_TORCH = Software({**NOT_ASSUMED, "cudnn": "torch is too old"})
IN_ORDER = Software(deterministic=True)
BF16 = {"dtype": "bfloat16", "sizes": {"k": 128, "t": 64, "s": 64, "b": 1, "h": 2, "n": 1 << 20}}


def test_every_op_has_its_plain_form_and_every_implementation_an_op() -> None:
    assert set(REFERENCE) == set(OPS)
    assert {entry.op for entry in IMPLEMENTATIONS} == set(OPS)
    assert all(candidates(op)[-1].package == "reference" for op in OPS)


def test_sizes_that_an_implementation_asks_for_are_labels_of_an_input() -> None:
    """A call shows the sizes of its inputs alone; a label that is none of theirs would never be looked at."""
    for entry in IMPLEMENTATIONS:
        labels = "".join(parse(OPS[entry.op].signature or "->").inputs)
        assert {label for label, _, _ in entry.sizes} <= set(labels), f"{entry.op}: {entry.package}"


@pytest.mark.parametrize("entry", IMPLEMENTATIONS, ids=lambda e: f"{e.op}-{e.package}-{e.devices[0]}")
def test_every_implementation_is_there(entry: Implementation) -> None:
    """A module or function that was renamed would fail on the cluster only."""
    if entry.package == "triton":
        pytest.importorskip("triton")
    assert callable(getattr(import_module(f"cinemesh.kernels.{entry.module}"), entry.function))
    if entry.devices == ("cpu",) or entry.package == "reference":
        assert entry.rate_class in rates.RATES
    assert entry.workspace(dict.fromkeys("tsbhkdlfpnij", 8), 2) >= 0


def test_a_rate_is_a_share_of_its_limit() -> None:
    """Free as these predictions are, one of zero or less would make an op take no time, or less than none."""
    assert all(0 < share <= 1 for rate in rates.RATES.values() for share in (rate.forward, rate.backward))


@pytest.mark.parametrize(
    ("op", "device", "given", "software", "wanted"),
    [
        ("attention", "sm_90", BF16, EVERYTHING, "flash-attn-3"),  # the best rate class, not the first of the list
        ("attention", "sm_80", BF16, EVERYTHING, "flash-attn"),  # as fast as torch's, which would copy
        ("attention", "sm_100", BF16, EVERYTHING, "flash-attn-4"),
        ("attention", "sm_90", BF16, PLAIN, "cudnn"),
        ("attention_backward", "sm_90", BF16, PLAIN, "cudnn"),
        ("attention", "sm_80", BF16, PLAIN, "torch"),
        ("attention", "sm_90", BF16, OLD_TORCH, "triton"),
        ("attention_backward", "sm_90", BF16, OLD_TORCH, "triton"),  # 458 TFLOP/s, in one order, against 348
        ("attention", "sm_90", BF16, IN_ORDER, "cudnn"),  # a forward sums in one order
        ("attention_backward", "sm_90", BF16, IN_ORDER, "triton"),  # 458 against 0.85 of 348
        ("attention_backward", "sm_90", BF16, Software({}, deterministic=True), "flash-attn-3"),
        ("attention", "sm_90", {**BF16, "sizes": {"k": 96}}, OLD_TORCH, "torch"),  # no such head dim in Triton
        ("attention", "sm_90", {**BF16, "dtype": "float64"}, EVERYTHING, "reference"),
        ("attention", "sm_75", BF16, EVERYTHING, "reference"),
        ("attention", "cpu", BF16, PLAIN, "torch"),
        ("cross_attention", "sm_90", BF16, EVERYTHING, "triton"),  # a key mask: none of the flash packages
        ("swiglu", "sm_90", BF16, PLAIN, "triton"),
        ("swiglu", "sm_90", {"dtype": "float64"}, PLAIN, "reference"),
        ("swiglu", "cpu", {"dtype": "float32"}, PLAIN, "reference"),
        ("matmul", "sm_90", {"dtype": "bfloat16"}, PLAIN, "torch"),
        ("residual", "cuda", {}, PLAIN, "reference"),
    ],
)
def test_choice(op: str, device: str, given: dict, software: Software, wanted: str) -> None:
    assert select(op, device, software, **given).entry.package == wanted


def test_every_gpu_attention_has_a_rate_on_every_chip_with_a_table() -> None:
    """A kernel that could be chosen on a chip and is not in its table would fail there, on the cluster."""
    for path in rates.TABLES.glob("*.yaml"):
        for entry in IMPLEMENTATIONS:
            if refusal(entry, path.stem, missing={}) is None:
                assert 0 < rates.rate(entry.rate_class, path.stem).share(OPS[entry.op].backward) <= 1, entry
    assert rates.rate("fa2", "sm_86") == rates.rate("fa2", "sm_80") != rates.rate("fa2", "sm_90")
    assert rates.rate("fa4", "sm_103") == rates.rate("fa4", "sm_100")


def test_packages_go_by_their_name_or_that_of_their_attention() -> None:
    assert packages_of(["fa3", "flash-attn-3", "apex"]) == ("flash-attn-3", "apex")
    assert PLAIN.packages == () and PLAIN.beside(packages_of(["fa2"])).packages == ("flash-attn",)
    assert EVERYTHING.packages == OPTIONAL
    for wrong in ("torch", "cudnn", "fa33"):
        with pytest.raises(CinemeshError, match=f"package '{wrong}' is none"):
            packages_of([wrong])


@pytest.mark.parametrize("version", ["2.9.1", "2.10.0+cu128", "1.13.1"])
def test_an_older_torch_is_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first record: else the first operator that it lacks ends every rank with an AttributeError."""
    monkeypatch.setattr(packages, "version_of", lambda _: version)
    with pytest.raises(CinemeshError, match=rf"torch {re.escape(version)} is older than 2\.11; install 2\.11 or newer"):
        registry.kernels_for("cpu")


@pytest.mark.parametrize("version", ["2.11.0a0+nv", "2.11.0+cu130", "2.14.1", "3.0", None])
def test_a_vendors_torch_is_taken(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version_of", lambda _: version)
    packages.check_torch()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_cuda_has_a_kernel_for_every_op(op: str, dtype: str) -> None:
    choice = select(op, "sm_90", dtype=dtype, sizes={"k": 8})
    assert choice.entry.package in ("torch", "cudnn", "reference", "triton")
    told = {id(choice.entry), *(id(entry) for entry, reason in choice.others if reason)}
    assert told == {id(entry) for entry in candidates(op)}  # each other one has its reason


def test_cpu_ops_are_bound_without_a_detour() -> None:
    """Nothing stands between the executor and the function: training on a CPU is as fast as without a choice."""
    for op, kernel in registry.kernels_for("cpu").items():
        assert not isinstance(kernel, registry._ByCall), op
        assert kernel is REFERENCE[op] or kernel.__module__ == "cinemesh.kernels.sdpa", op


def test_choice_follows_the_call_where_it_must() -> None:
    """One kernel object, three dtypes: bf16 and fp32 go to Triton (interpreted or not), float64 to the reference."""
    pytest.importorskip("triton")
    place = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = registry._kernel("swiglu", "sm_90", PLAIN)
    assert isinstance(kernel, registry._ByCall)
    for dtype, module in ((torch.bfloat16, "swiglu"), (torch.float32, "swiglu"), (torch.float64, "reference")):
        gate, up, out, want = (torch.randn(3, 2, 40).to(place, dtype) for _ in range(4))
        kernel([gate, up], [out])
        REFERENCE["swiglu"]([gate, up], [want])
        torch.testing.assert_close(out, want)
        assert kernel._chosen[(dtype,)].__module__ == f"cinemesh.kernels.{module}"


def test_measured_rates_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a card says that torch's attention is faster than cuDNN's, the registry picks torch's."""
    measured = tuning.Table("H100", "measured", rates={"torch": {"forward": 0.7}})
    monkeypatch.setattr(rates, "table", lambda _: measured)
    assert select("attention", "sm_90", **BF16).entry.package == "torch"
    assert select("attention_backward", "sm_90", **BF16).entry.package == "cudnn"


def test_deterministic_kernels_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this sees that a recipe's wish arrives in the packages' calls; on a CPU every kernel sums in one order."""
    called: list[tuple[str, dict]] = []
    monkeypatch.setattr(registry, "function", lambda entry: lambda i, o, **attrs: called.append((entry.package, attrs)))
    q, kv, mask = (torch.zeros(s, dtype=torch.bfloat16) for s in ((4, 1, 2, 128), (4, 1, 2, 2, 128), (1, 4)))
    lse = torch.zeros(1, 2, 4)
    for missing, deterministic in (({}, True), ({}, False), (NOT_ASSUMED, True), (NOT_ASSUMED, False)):
        software = Software(missing, deterministic=deterministic)
        registry._kernel("attention", "sm_90", software)([q, kv], [q, lse])
        registry._kernel("attention_backward", "sm_90", software)([q, q, kv, q, lse], [q, kv])
    asked = {"deterministic": True}
    assert called == [
        *(("flash-attn-3", {}), ("flash-attn-3", asked), ("flash-attn-3", {}), ("flash-attn-3", {})),
        *(("cudnn", {}), ("triton", {}), ("cudnn", {}), ("cudnn", {})),
    ]
    called.clear()
    only = Software(NOT_ASSUMED, {"cross_attention_backward": "torch"}, deterministic=True)
    registry._kernel("cross_attention_backward", "sm_90", only)([q, q, kv, q, lse, mask], [q, kv])
    assert called == [("torch", asked)]
    with pytest.raises(CinemeshError, match="sums in any order, and deterministic kernels are asked for"):
        select("attention_backward", "sm_90", Software({}, {"attention_backward": "cudnn"}, deterministic=True), **BF16)


def test_a_rank_names_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched ranks say ``cuda:1``, and a server may hold cards of two kinds."""
    cards = {"cuda:1": ((8, 0), "NVIDIA A100-SXM4-80GB")}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards[device][0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: cards[device][1])
    kernel = registry.kernels_for("cuda:1")["attention"]
    assert isinstance(kernel, registry._ByCall) and kernel.device == "sm_80"


# -- SMs left to communication ----------------------------------------------------------------------------------------


@pytest.fixture
def blas(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What is asked of torch's products, whose CUDA half is not here."""
    asked: dict[str, object] = {"carveout": None}
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda name: asked.update(library=name))
    monkeypatch.setattr(torch._C, "_set_sm_carveout_experimental", lambda sms: asked.update(carveout=sms))
    monkeypatch.setattr(torch._C, "_get_sm_carveout_experimental", lambda: asked["carveout"])
    return asked


def on_hopper(software: Software, override: str | None = None) -> dict:
    overrides = {op: override for op in LEAVE_SMS if "attention" in op} if override else {}
    kernels = {op: registry._kernel(op, "sm_90", replace(software, overrides=overrides)) for op in LEAVE_SMS}
    return kernels | {"swiglu": REFERENCE["swiglu"]}


def test_sms_are_left_by_products_and_self_attention(monkeypatch: pytest.MonkeyPatch, blas: dict) -> None:
    """Only this sees that the margin arrives in the packages' calls; without a GPU nothing else would notice."""
    called: list[tuple[str, dict]] = []
    monkeypatch.setattr(registry, "function", lambda entry: lambda i, o, **attrs: called.append((entry.package, attrs)))
    kernels = on_hopper(EVERYTHING)
    left = registry.leave_sms(kernels, 16)
    assert blas == {"carveout": 16, "library": "cublaslt"}
    assert left["matmul"] is kernels["matmul"] and left["swiglu"] is kernels["swiglu"]
    q, kv = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((4, 1, 2, 128), (4, 1, 2, 2, 128)))
    left["attention"]([q, kv], [])
    left["attention_backward"]([q, q, kv], [])
    kernels["attention"]([q, kv], [])
    assert called == [("flash-attn-3", {"sm_margin": 16})] * 2 + [("flash-attn-3", {})]
    assert registry.leave_sms(kernels, 0) == kernels and blas["carveout"] is None  # another plan of the process


@pytest.mark.parametrize(
    ("software", "override", "said"),
    [
        (OLD_TORCH, None, "attention runs on triton (our Triton forward, deterministic), which takes every SM"),
        (PLAIN, None, "attention runs on cudnn (cuDNN's attention, in torch's CUDA builds), which takes every SM"),
        (EVERYTHING, "flash-attn", "attention runs on flash-attn (FlashAttention-2, package flash-attn)"),
        (EVERYTHING, "reference", "attention runs on reference, which takes every SM"),
    ],
)
def test_an_attention_that_takes_every_sm_is_an_error(
    software: Software, override: str | None, said: str, blas: dict
) -> None:
    with pytest.raises(CinemeshError) as error:
        registry.leave_sms(on_hopper(software, override), 16)
    assert str(error.value).startswith(f"plan: sm_margin(16): {said}")
    assert str(error.value).endswith(
        "use flash-attn-3 (FlashAttention-3 for Hopper, built from source), or set sm_margin to 0"
    )
    assert blas == {"carveout": None}, "nothing is set by what is refused"


# -- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_of_recipe_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.kernels_for("cpu", {"attention": "reference"})["attention"] is REFERENCE["attention"]
    monkeypatch.setenv(selection.OVERRIDE_VARIABLE, "attention=torch, swiglu=reference")
    kernels = registry.kernels_for("cpu", {"attention": "reference"})
    assert kernels["attention"].__module__ == "cinemesh.kernels.sdpa"  # the environment wins
    monkeypatch.setenv(selection.OVERRIDE_VARIABLE, "all=reference")
    assert all(kernel is REFERENCE[op] for op, kernel in registry.kernels_for("cpu").items())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("attention", "'attention' is not op=package; write for example attention=triton"),
        ("atention=triton", "unknown op 'atention'; did you mean 'attention'?"),
        ("attention=trito", "unknown package 'trito'; did you mean 'triton'?"),
        ("swiglu=apex", "apex has no swiglu; choose one of triton, reference"),
        ("attention=flash-attn-3", "on cpu: runs on cuda, not on cpu. Usable there: torch, reference"),
        ("adamw=apex", "on cpu: runs on cuda, not on cpu"),
    ],
)
def test_an_override_that_cannot_be_met_is_an_error(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(selection.OVERRIDE_VARIABLE, text)
    with pytest.raises(CinemeshError) as error:
        registry.kernels_for("cpu")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("device", "given", "said"),
    [
        ("sm_80", BF16, "needs sm_90 or newer, got sm_80"),
        ("sm_100", BF16, "needs a device older than sm_100, got sm_100"),
        ("sm_90", {**BF16, "dtype": "float32"}, "takes bfloat16 or float16, got float32"),
        ("sm_90", {**BF16, "sizes": {"k": 20}}, "wants k a multiple of 8, at most 256, got 20"),
    ],
)
def test_an_override_on_the_wrong_call_is_an_error(device: str, given: dict, said: str) -> None:
    with pytest.raises(CinemeshError) as error:
        select("attention", device, Software({}, {"attention": "flash-attn-3"}), **given)
    assert said in str(error.value)
    assert f"kernel override attention=flash-attn-3 on {device}" in str(error.value)


# -- packages ---------------------------------------------------------------------------------------------------------


def plant(folder: Path, *files: str) -> str:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return str(folder)


NVIDIA = ("apex/__init__.py", "apex/normalization/fused_layer_norm.py", "apex/multi_tensor_apply/__init__.py")


def test_apex_is_told_from_its_namesake(tmp_path: Path) -> None:
    """PyPI's ``apex`` imports under the same name, and knows nothing of norms."""
    other = plant(tmp_path / "pypi", "apex/__init__.py", "apex/models.py")
    assert "is not NVIDIA's" in (packages.nvidia_apex(other) or "")
    python_only = plant(tmp_path / "python", *NVIDIA)
    assert "without its CUDA extension amp_C" in (packages.nvidia_apex(python_only) or "")
    whole = plant(tmp_path / "whole", *NVIDIA, "amp_C.py", "fused_layer_norm_cuda.py")
    assert packages.nvidia_apex(whole) is None
    assert "not installed" in (packages.nvidia_apex(str(tmp_path)) or "")


def test_nothing_is_installed_that_nobody_uses() -> None:
    """The wrong apex must never come in as a dependency."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"apex' not in text


# -- tuning tables ----------------------------------------------------------------------------------------------------


def test_tiles_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = {"BLOCK": 64, "num_warps": 4}
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    tuning.table.cache_clear()
    shape = tuning.shape_class(T=9216, D=6144)
    assert shape == "D8192,T16384" == tuning.shape_class(D=8192, T=8193)
    assert tuning.tile("swiglu.forward", shape, default, "h100") == default
    found = tuning.Table("NVIDIA H100", "measured on it", {"swiglu.forward": {shape: {"BLOCK": 128}}}, {})
    tuning.write(found, tuning.path_of("h100"))
    assert tuning.table("h100") == found
    assert tuning.tile("swiglu.forward", shape, default, "h100") == {"BLOCK": 128, "num_warps": 4}
    assert tuning.tile("swiglu.forward", "D64", default, "h100") == default
    with pytest.raises(CinemeshError, match="names BLOCK; this kernel has TILE"):
        tuning.tile("swiglu.forward", shape, {"TILE": 1}, "h100")
    (tmp_path / "h100.yaml").write_text("tiles: [")
    tuning.table.cache_clear()
    with pytest.raises(CinemeshError, match=r"tuning table .*h100\.yaml"):
        tuning.table("h100")
    tuning.table.cache_clear()


def test_shipped_tables_say_where_they_come_from() -> None:
    for path in tuning.TABLES.glob("*.yaml"):
        found = tuning.table(path.stem)
        assert tuning.device_key(found.device) == path.stem
        assert found.origin == tuning.REASONED or "measured" in found.origin


# -- what a kernel is given -------------------------------------------------------------------------------------------


def attention_inputs(heads: int = 2, keys: int = 3, dim: int = 64) -> dict[str, torch.Tensor]:
    return {"q": torch.zeros(4, 1, 2, dim), "kv": torch.zeros(keys, 1, 2, heads, dim)}


MISTAKES: list[tuple[str, Callable[[], dict[str, torch.Tensor]], str]] = [
    ("heads", lambda: attention_inputs(heads=3), "attention: kv: got 3 heads, wanted 2 as in q"),
    (
        "empty",
        lambda: attention_inputs(keys=0),
        "attention: kv: got shape (0, 1, 2, 2, 64), wanted at least one of keys",
    ),
    ("head dim", lambda: attention_inputs(dim=80), "attention: q: got head dim 80, wanted 64 or 128"),
    (
        "dtype",
        lambda: {**attention_inputs(), "q": torch.zeros(4, 1, 2, 64, dtype=torch.float64)},
        "attention: q: got dtype float64, wanted float32 or bfloat16",
    ),
    (
        "dims",
        lambda: {**attention_inputs(), "kv": torch.zeros(3, 2, 2, 64)},
        "attention: kv: got shape (3, 2, 2, 64), wanted 5 dims: keys, samples, K,V pair, heads, head dim",
    ),
    (
        "non-contiguous",
        lambda: {**attention_inputs(), "q": torch.zeros(4, 1, 2, 66)[..., :64]},
        "attention: q: got strides (132, 132, 66, 1) of shape (4, 1, 2, 64), wanted a contiguous tensor",
    ),
    (
        "misaligned",
        lambda: {**attention_inputs(), "q": torch.zeros(4 * 2 * 64 + 1)[1:].view(4, 1, 2, 64)},
        "attention: q: got an address 4 bytes past a multiple of 16, wanted one aligned to 16 bytes",
    ),
    (
        "device",
        lambda: {**attention_inputs(), "kv": torch.zeros(3, 1, 2, 2, 64, device="meta")},
        "attention: kv: got a tensor on meta, wanted one on cpu as the others",
    ),
]


@pytest.mark.parametrize(("make", "said"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_a_wrong_tensor_is_named(make: Callable[[], dict[str, torch.Tensor]], said: str) -> None:
    labels, dtypes = {"q": "tbhk", "kv": "sbchk"}, (torch.float32, torch.bfloat16)
    with pytest.raises(CinemeshError) as error:
        check("attention", {n: (x, labels[n], dtypes) for n, x in make().items()}, offered={"k": (64, 128)})
    assert said in str(error.value)


def test_slices_of_larger_buffers_keep_their_alignment() -> None:
    whole = torch.zeros(4, 2, 6, 64)
    dtypes = (torch.float32,)
    sizes = check("attention", {"q": (whole[:, :, 2:4], "tbhk", dtypes)}, strided=("q",))
    assert sizes == {"t": 4, "b": 2, "h": 2, "k": 64}
    with pytest.raises(CinemeshError, match="wanted rows at multiples of 16 bytes"):
        check("attention", {"q": (torch.zeros(4, 2, 3, 65)[..., :64], "tbhk", dtypes)}, strided=("q",))
    with pytest.raises(CinemeshError, match="wanted a contiguous last dim"):
        check("attention", {"q": (torch.zeros(4, 2, 64, 3).transpose(2, 3), "tbhk", dtypes)}, strided=("q",))
