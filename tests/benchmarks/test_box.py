"""The box: what leaves it, however, leaves nothing behind; and its ranks meet over the link."""

import subprocess
from pathlib import Path

import pytest
from benchmarks.box import Box, NotAllowed


def namespaces() -> set[str]:
    shown = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in shown.splitlines()}


@pytest.fixture
def allowed() -> None:
    """Skips, with the reason, where no box can be built."""
    try:
        with Box(100):
            pass
    except NotAllowed as reason:
        pytest.skip(str(reason))


@pytest.mark.usefixtures("allowed")
def test_nothing_is_left_behind_whatever_happened_inside(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text("import os, sys\nsys.exit(int(os.environ['RANK'] == '2'))\n")
    box = Box(100)
    with pytest.raises(RuntimeError, match="rank 2 of the box failed"), box:
        assert set(box.names) <= namespaces()
        box.run([str(script)])
    assert not set(box.names) & namespaces()


@pytest.mark.usefixtures("allowed")
def test_a_server_has_its_link_and_no_other_way_out(tmp_path: Path) -> None:
    script = tmp_path / "reach.py"
    script.write_text("import socket\nprint(*sorted(name for _, name in socket.if_nameindex()))\n")
    with Box(100) as box:
        inside = set(box.run([str(script)]).split())
    assert {"link0", "lo"} <= inside and not any(name.startswith("eth") for name in inside)


@pytest.mark.usefixtures("allowed")
def test_a_limit_that_cannot_be_set_says_so_and_leaves_nothing() -> None:
    box = Box(0.0)
    with pytest.raises(NotAllowed, match="tc qdisc"), box:
        pass
    assert not set(box.names) & namespaces()
