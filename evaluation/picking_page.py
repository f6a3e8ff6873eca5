"""The page on which people pick, trim and caption clips for finetuning, served to this machine alone."""

from __future__ import annotations

from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path

from ..data.scenes import IMAGE_SUFFIXES, Scene
from ..errors import CinemeshError
from .journal import LastAnswers
from .local_page import LocalHandler, LocalServer, rendered
from .picks import PICKS_FILE, clips_to_pick, pick_of, read_checklist, read_picks

MOST_BYTES_OF_A_PICK = 50_000  # a name, seconds and a caption
CLIP = "/clips/"


class PickingServer(LocalServer):
    """Serves the clips of a manifest; ``port`` 0 takes a free one. Raises CinemeshError where it cannot."""

    def __init__(self, manifest: Path, port: int) -> None:
        self.clips = clips_to_pick(manifest)
        self.checklist = read_checklist()
        self.files = {f"{CLIP}{number}": _file(scene) for number, scene in enumerate(self.clips.values())}
        shown = [
            {
                "clip": name,
                "file": address,
                "image": self.files[address].suffix.lower() in IMAGE_SUFFIXES,
                "first_s": float(scene.from_s or 0),
                "last_s": None if scene.until_s is None else float(scene.until_s),
                "caption": scene.caption,
            }
            for address, (name, scene) in zip(self.files, self.clips.items(), strict=True)
        ]
        checklist = [asdict(flaw) for flaw in self.checklist]
        page = rendered("pick.html", given={"clips": shown, "checklist": checklist}, checklist=checklist)
        self.picks = LastAnswers(manifest.with_name(PICKS_FILE), lambda: read_picks(manifest, self.clips))
        try:
            super().__init__(page, port, PickingHandler)
        except CinemeshError:
            self.picks.close()
            raise

    def add(self, row: object) -> None:
        """Write a pick as JSON has it, and wait for the disk. Raises CinemeshError as ``pick_of``."""
        pick = pick_of(row, "the pick", self.clips, [flaw.name for flaw in self.checklist])
        self.picks.add(pick.clip, pick)

    def server_close(self) -> None:
        super().server_close()
        self.picks.close()


def _file(scene: Scene) -> Path:
    """Raises CinemeshError for one that is not there."""
    assert isinstance(scene.source, Path)
    if not scene.source.is_file():
        raise CinemeshError(f"{scene.source}, of clip {scene.name}, is not there", remedy="put the file back")
    return scene.source


class PickingHandler(LocalHandler):
    server: PickingServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        """The page, a clip, or the picks so far."""
        if not self.is_local():
            return
        if self.path == "/":
            self.send_page()
        elif self.path == "/state":
            self.send_json({name: asdict(pick) for name, pick in self.server.picks.given().items()})
        elif (file := self.server.files.get(self.path)) is not None:
            self.send_file(file)
        else:
            self.refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        """A pick."""
        self.save("/pick", "the pick", MOST_BYTES_OF_A_PICK, self.server.add)
