"""Chromium without a window, driven over its debugging pipe: opens a page, presses keys, asks the page."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
PATIENCE_S = 90.0  # for what a page must come to, on a busy machine
CODES = {"Enter": 13, "Backspace": 8, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, " ": 32}
AS_3_AND_4 = """  # the file descriptors on which the browser hears and answers
import fcntl, os, sys
heard, told = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(heard, 3)
os.dup2(told, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A page. Used as a context; the browser ends with it."""

    def __init__(self, profile: Path) -> None:
        self._profile = profile

    def __enter__(self) -> Browser:
        (commands, self._to), (self._from, replies) = os.pipe(), os.pipe()
        options = (
            *(
                "--remote-debugging-pipe",
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--mute-audio",
                "--no-first-run",
            ),
            *("--disable-background-networking", "--disable-extensions", "--autoplay-policy=no-user-gesture-required"),
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", AS_3_AND_4, str(commands), str(replies), CHROMIUM, *options,
             f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=(commands, replies), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(replies)
        self._count, self._heard, self._session = 0, b"", ""
        try:
            targets = self._ask("Target.getTargets")["targetInfos"]
            page = next(each["targetId"] for each in targets if each["type"] == "page")
            self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        asked = {"id": self._count, "method": method, "params": params}
        os.write(self._to, json.dumps(asked | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        while True:
            while b"\0" not in self._heard:
                piece = os.read(self._from, 2**16)
                assert piece, "the browser ended"
                self._heard += piece
            message, _, self._heard = self._heard.partition(b"\0")
            reply = json.loads(message)
            if reply.get("id") == self._count:
                assert "error" not in reply, reply
                return reply["result"]

    def resize(self, width: int, height: int, scale: int = 1, *, mobile: bool = False) -> None:
        """To a screen of so many CSS pixels, each ``scale`` of its own wide."""
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def open(self, address: str) -> None:
        self._ask("Page.navigate", url=address)

    def reload(self) -> None:
        self._ask("Page.reload")

    def type(self, text: str) -> None:
        self._ask("Input.insertText", text=text)

    def press(self, key: str, *, ctrl: bool = False) -> None:
        """A key, as the keyboard sends it to what has the focus."""
        letter = "" if ctrl else key if len(key) == 1 else "\r" if key == "Enter" else ""
        pressed = {"key": key, "windowsVirtualKeyCode": CODES.get(key, ord(key[0].upper())), "modifiers": 2 * ctrl}
        self._ask("Input.dispatchKeyEvent", type="keyDown", **pressed, **({"text": letter} if letter else {}))
        self._ask("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def add_style(self, css: str) -> None:
        self.value(f"document.head.append(Object.assign(document.createElement('style'), {{textContent: {css!r}}}))")

    def remove_style(self) -> None:
        """The one that was added last."""
        self.value("document.head.lastElementChild.remove()")

    def value(self, script: str) -> Any:
        """What an expression of the page is worth."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """Until it is worth something true."""
        end = time.monotonic() + PATIENCE_S
        while not (value := self.value(script)):
            assert time.monotonic() < end, f"never: {script}; {self.value('document.body.innerText')}"
            time.sleep(0.02)
        return value
