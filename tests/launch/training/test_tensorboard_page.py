"""TensorBoard in a browser: a run's curves and clips are what it shows, and it needs nothing but itself."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from layout import opened
from training import start

pytestmark = [pytest.mark.usefixtures("one_process"), pytest.mark.slow]

# All text, in open shadow roots too: TensorBoard is built of web components.
TEXT = """(() => {
  const found = []
  const walk = node => {
    if (node.nodeType === Node.TEXT_NODE) found.push(node.textContent.trim())
    if (node.shadowRoot) walk(node.shadowRoot)
    node.childNodes.forEach(walk)
  }
  walk(document.body)
  return found.filter(Boolean).join(' ')
})()"""
IMAGES = "[...document.querySelectorAll('img')].filter(i => i.naturalWidth > 0).map(i => [i.naturalWidth, i.src])"
ELSEWHERE = (
    "performance.getEntriesByType('resource').map(r => r.name)"
    ".filter(n => !n.startsWith(location.origin) && !n.startsWith('data:') && !n.startsWith('blob:'))"
)


@contextmanager
def tensorboard_of(run: Path) -> Iterator[str]:
    """Its address, while it runs on a free port of this machine alone."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield next(found[0] for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+/", line)))
        finally:
            process.kill()


def test_curves_and_clips_of_a_run_are_shown(browser: Browser, values: dict[str, Any], tmp_path: Path) -> None:
    """Losses, the clips of a scene, the histogram of the steps' time; nothing is asked of another host."""
    values["sample"] = {"scenes": ["left"], "steps": 2, "every": 2}
    assert start(values, tmp_path) == 0
    with tensorboard_of(tmp_path / "run") as address:
        opened(browser, "screen", address)
        browser.wait(f"{TEXT}.includes('validation_loss')")
        told = browser.value(TEXT)
        for tag in ("loss", "gradient_norm", "lr", "clips", "left"):
            assert tag in told, (tag, told[:2000])
        browser.wait(f"{IMAGES}.length > 0")
        assert {width for width, _ in browser.value(IMAGES)} == {32}
        assert browser.value(ELSEWHERE) == []
