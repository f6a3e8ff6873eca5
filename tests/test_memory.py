"""What a machine still gives, read from a /proc and a /sys made up here."""

from __future__ import annotations

from pathlib import Path

import pytest

from cinemesh.memory import available_bytes

INSTALLED = 1 << 40


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 1 TiB with 500,000 KiB available."""
    monkeypatch.setattr("cinemesh.memory.os.sysconf", {"SC_PHYS_PAGES": INSTALLED >> 12, "SC_PAGE_SIZE": 4096}.get)
    _write(tmp_path, {"proc/meminfo": "MemTotal: 1 kB\nMemFree: 2 kB\nMemAvailable:  500000 kB\n"})
    return tmp_path


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_the_system_calls_available_counts(root: Path) -> None:
    """Not what is free: caches are given back."""
    assert available_bytes(root) == 500_000 * 1024


def test_where_nothing_tells_it_is_what_is_installed(root: Path, tmp_path: Path) -> None:
    assert available_bytes(root / "nowhere") == INSTALLED


@pytest.mark.parametrize("limited", ["a", "a/b"])
def test_a_control_group_limits_and_so_do_those_above_it(root: Path, limited: str) -> None:
    """100,000 of its bytes are taken, 30,000 of these a cache."""
    group = {"memory.max": "max", "memory.current": "100000", "memory.stat": "anon 5\ninactive_file 30000\n"}
    files = {f"sys/fs/cgroup/{path}/{name}": text for path in ("a", "a/b") for name, text in group.items()}
    _write(root, {"proc/self/cgroup": "0::/a/b\n", **files, f"sys/fs/cgroup/{limited}/memory.max": "300000"})
    assert available_bytes(root) == 300_000 - 70_000


def test_so_does_one_of_version_1(root: Path) -> None:
    top = "sys/fs/cgroup/memory/x"
    _write(
        root,
        {
            "proc/self/cgroup": "4:memory:/x\n3:cpuset:/\n",
            f"{top}/memory.limit_in_bytes": "300000",
            f"{top}/memory.usage_in_bytes": "100000",
            f"{top}/memory.stat": "cache 50000\ntotal_inactive_file 30000\n",
        },
    )
    assert available_bytes(root) == 300_000 - 70_000
