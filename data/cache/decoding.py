"""The windows of scenes, as they are decoded; nothing is encoded here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tqdm import tqdm

from ...errors import CinemeshError
from ..scenes import Scene
from ..settings import Cut, DataSettings
from ..sources import Source
from ..stills import is_still, still_windows
from ..video import Survey, Window, read_windows
from .survey import UnitSurvey, look_at_files


def decoded_windows(settings: DataSettings, progress: bool = True) -> Iterator[Window]:
    """The windows of a recipe's scenes as they are decoded, nothing encoded; damaged clips are left out.

    Raises CinemeshError as ``build`` does for clips, captions and buckets.
    """
    scenes = settings.scenes()[:]
    sources = sources_of(scenes, settings.sources())
    found = look_at_files(scenes, sources, progress)
    if len(found.skipped) == found.clips:
        raise CinemeshError(
            f"no clip can be read: {found.skipped[0].file}, {found.skipped[0].reason}", remedy="replace them"
        )
    yield from windows_of(found, sources, settings.cuts(found.spans), progress)


def windows_of(
    found: UnitSurvey, sources: Mapping[str, Source], cuts: Mapping[str, Sequence[Cut]], progress: bool = False
) -> Iterator[Window]:
    """Every window of the files of a survey, as it is decoded."""
    files = tqdm(found.files.items(), desc="decoding clips", unit="clip", disable=None if progress else True)
    for file, interlaced in files:
        scenes = [span.scene for span in found.spans if span.scene.file == file]
        if is_still(sources[file]):
            yield from still_windows(sources[file], cuts, scenes)
        else:
            yield from read_windows(sources[file], Survey(interlaced=interlaced), cuts, scenes)


def sources_of(scenes: Sequence[Scene], sources: Mapping[str, Source]) -> dict[str, Source]:
    """Of each scene's file. Raises CinemeshError for a file that is not among the clips."""
    found: dict[str, Source] = {}
    for scene in scenes:
        source = scene.source or sources.get(scene.file)
        if source is None:
            raise CinemeshError(
                f"scene {scene.name} needs {scene.file}, which is not among the clips "
                f"({', '.join(sorted(sources))}): correct data.clips or the captions file"
            )
        found[scene.file] = source
    return found
