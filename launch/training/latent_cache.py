"""The latent cache of a run: the versions that its recipe names, or the one that it makes, built by all ranks."""

from __future__ import annotations

import json
from pathlib import Path

from ...data.cache.building import CacheBuild, say_old
from ...data.cache.history import History
from ...data.cache.storage import is_url
from ...data.cache.version import VersionChange, changes_of
from ...data.encoding import Encoding
from ...data.settings import DataSettings
from ...documents import parse_json
from ...errors import CinemeshError
from ..cluster.meeting import hear
from ..cluster.processes import Joined
from .captions import cache_encoding
from .setting import Setting

SAID_THERE = "latent cache"  # where rank 0 says, at the ranks' meeting, which version there is, or what is to be built


def open_history(setting: Setting, place: Joined) -> History:
    """The versions of the latent cache that the run draws from: those that the recipe names, or the one it makes.

    That is built where it is missing, by all ranks. Raises CinemeshError as ``CacheBuild.work``, and for a version that
    is not there.
    """
    data, encoding = setting.config.data, cache_encoding(setting.config, setting.encoding)
    changes = changes_of(data.versions) or [VersionChange(0, built_version(data.cache, data, encoding, place))]
    return History.open(data.cache, changes)


def built_version(cache: str, data: DataSettings, encoding: Encoding, place: Joined) -> str:
    """The name of the version that a recipe makes; built where it is missing, by all ranks. Raises as above."""
    if is_url(cache):
        raise CinemeshError(
            f"data.cache is {cache}, and a cache is built in a folder alone",
            remedy="name the versions to read there: --set 'data.versions={0: VERSION}'",
        )
    root, meeting = Path(cache), place.meeting
    if place.rank and meeting is not None:
        version, digest = parse_json(hear(meeting, SAID_THERE), SAID_THERE, "start the job again")
        return version or CacheBuild.joined(data, encoding, root, digest).work(False, place.marks)
    build = CacheBuild.planned(data, encoding, root)
    if place.rank == 0:
        say_old(root)
    version = build.version()
    if meeting is not None:
        build.write_plan()
        meeting.store.set(SAID_THERE, json.dumps([version, build.digest]))
    return version or build.work(place.rank == 0, place.marks)
