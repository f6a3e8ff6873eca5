"""The GPUs of this machine as NVML tells of them: no CUDA context is made, no torch is loaded (torch-free)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

# Reasons for which a clock is held down (nvml.h, nvmlClocksEventReasons): those that tell of something wrong.
SLOWED = {0x08: "hardware slowdown", 0x40: "heat (hardware)", 0x80: "power brake", 0x20: "heat (software)"}


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """One GPU. None: NVML does not tell. Watts, MHz, degrees Celsius.

    ``ecc_errors``: uncorrected since the driver was loaded; ``rows_failed``: memory rows that could not be replaced, or
    wait for a reset to be; ``links``: NVLinks that are up, of those there are; ``slowed``: why its clock is held down.
    """

    index: int
    name: str
    memory_bytes: int
    used_bytes: int
    clock_mhz: int | None = None
    most_clock_mhz: int | None = None
    power_w: float | None = None
    power_cap_w: float | None = None
    usual_cap_w: float | None = None
    temperature_c: int | None = None
    ecc_on: bool | None = None
    ecc_errors: int | None = None
    rows_failed: bool | None = None
    links: tuple[int, int] | None = None
    slowed: tuple[str, ...] = field(default=())


def cards_here() -> tuple[list[CardFacts], str]:
    """All GPUs of this machine, and why there are none, empty where there are."""
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        return [], f"NVML: {error}"
    return [_card(nvml, index) for index in range(count)], "" if count else "the driver has none"


def driver_version() -> str:
    """NVIDIA's driver, empty where there is none."""
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        return str(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError:
        return ""


def _card(nvml: Any, index: int) -> CardFacts:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def told(ask: Callable[[], T]) -> T | None:
        try:
            return ask()
        except nvml.NVMLError:
            return None

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    cap = told(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    draws = told(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    usual = told(lambda: nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle))
    rows = told(lambda: nvml.nvmlDeviceGetRemappedRows(handle))  # corrected, uncorrected, pending, failed
    ecc = told(lambda: nvml.nvmlDeviceGetEccMode(handle))
    reasons = told(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
    uncorrected, volatile = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    states = [told(lambda link=link: nvml.nvmlDeviceGetNvLinkState(handle, link)) for link in range(18)]
    there = [state for state in states if state is not None]
    return CardFacts(
        index=index,
        name=str(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(memory.total),
        used_bytes=int(memory.used),
        clock_mhz=told(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        most_clock_mhz=told(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        power_w=None if draws is None else draws / 1e3,
        power_cap_w=None if cap is None else cap / 1e3,
        usual_cap_w=None if usual is None else usual / 1e3,
        temperature_c=told(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        ecc_on=None if ecc is None else bool(ecc[0]),
        ecc_errors=told(lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, uncorrected, volatile)),
        rows_failed=None if rows is None else bool(rows[2] or rows[3]),
        links=(sum(map(bool, there)), len(there)) if there else None,
        slowed=tuple(why for bit, why in SLOWED.items() if reasons & bit),
    )
