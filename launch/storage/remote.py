"""A place on an object store, by its URL: what ``fsspec`` reaches, with the words of ``pathlib`` (torch-free).

An object appears whole or not at all and cannot be renamed. Where the store compares before it writes (the conditional
PUT of S3, If-None-Match), one of several writers of a name is the first, and all others know.

Which package reaches a protocol, with what address and credentials, is fsspec's to say: the environment
(``AWS_ACCESS_KEY_ID``, ``FSSPEC_S3_ENDPOINT_URL``), or a file in ``~/.config/fsspec``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import CinemeshError, in_a_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

REMEDY = "see to its address and credentials, as docs/checkpoints.md says, and that the server answers"
MAKE_BUCKET = "make the bucket, or name another"
# Whose package writes a name that is there already only if asked to, in one request: read in their sources, and shown
# on S3 (s3fs 2026.9, gcsfs 2026.10; 2026-11-30). adlfs and fsspec's own do not: they look first, and then write.
CONDITIONAL = ("s3", "s3a", "gs", "gcs")


@dataclass(frozen=True)
class RemotePath:
    """``url``: ``s3://bucket/run``, without a slash at its end.

    Methods raise FileNotFoundError where there is none of this name, and CinemeshError for whatever else the store, or
    the way to it, has against them.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rpartition("/")[0])

    @property
    def is_conditional(self) -> bool:
        """Whether :meth:`create` has one winner, whoever else tries at the same moment."""
        return self.url.partition("://")[0] in CONDITIONAL

    def check(self) -> None:
        """Raise CinemeshError where no package reaches such a URL."""
        protocol = self.url.partition("://")[0]
        try:
            _file_system(self.url)
        except ImportError as error:
            extra = "pip install 'cinemesh[s3]'" if protocol in ("s3", "s3a") else "install the package that it names"
            raise CinemeshError(f"{self}: {in_a_line(error)}", remedy=extra) from error
        except ValueError as error:
            known = ", ".join(f"{one}://" for one in CONDITIONAL)
            raise CinemeshError(
                f"{self}: {in_a_line(error)}", remedy=f"name a path, or a URL of what fsspec knows: {known} and others"
            ) from error

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return self.size() is not None

    def is_dir(self) -> bool:
        """Whether anything lies below."""
        return (found := self._info()) is not None and found["type"] == "directory"

    def size(self) -> int | None:
        """Bytes of the file of this name; None where there is none."""
        found = self._info()
        return int(found["size"]) if found is not None and found["type"] == "file" else None

    def modified(self) -> float | None:
        """When it was written, by the store's clock, in seconds; None where it is not there."""
        try:
            with self._asking("read") as (files, path):
                return files.modified(path).timestamp()
        except FileNotFoundError:
            return None

    def children(self) -> list[RemotePath]:
        """All files and folders in it; none where there is no such folder."""
        try:
            with self._asking("list") as (files, path):
                found = files.ls(path, detail=False)
        except FileNotFoundError:
            return []
        names = {each.rstrip("/").rpartition("/")[2] for each in found if each.rstrip("/") != path.rstrip("/")}
        return [self / name for name in sorted(names)]

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        with self._asking("read") as (files, path):
            found: Any = files.cat_file(path, start=start, end=stop)
            return found

    def write(self, chunks: Iterable[memoryview]) -> None:
        """An object of these bytes, sent as they come."""
        with self._writing() as (files, path):
            file: Any = files.open(path, "wb")
            try:
                for chunk in chunks:
                    file.write(chunk)
                file.close()
            except BaseException:
                with suppress(Exception):
                    file.discard()
                file.closed = True  # or it closes itself when it is collected, and gives the name to what there is
                raise

    def put(self, data: bytes) -> None:
        """In place of what may be there."""
        with self._writing() as (files, path):
            files.pipe_file(path, data)

    def create(self, data: bytes) -> bool:
        """Whether the object is there with these bytes; not where there is another of its name."""
        try:
            with self._writing() as (files, path):
                files.pipe_file(path, data, mode="create")
        except FileExistsError:
            return self.read() == data  # an answer that was lost: what was asked again had been done
        return True

    def unlink(self, *, missing_ok: bool = False) -> None:
        try:
            with self._asking("remove") as (files, path):
                files.rm_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_all(self) -> None:
        """Whatever lies below."""
        try:
            with self._asking("remove") as (files, path):
                files.rm(path, recursive=True)
        except FileNotFoundError:
            pass

    def _info(self) -> dict[str, Any] | None:
        try:
            with self._asking("read") as (files, path):
                return files.info(path)
        except FileNotFoundError:
            return None

    @contextmanager
    def _asking(self, doing: str) -> Iterator[tuple[AbstractFileSystem, str]]:
        try:
            yield _file_system(self.url, use_listings_cache=False)  # others write there
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # each protocol's package has exceptions of its own
            raise CinemeshError(f"cannot {doing} {self}: {in_a_line(error)}", remedy=REMEDY) from error

    @contextmanager
    def _writing(self) -> Iterator[tuple[AbstractFileSystem, str]]:
        try:
            with self._asking("write") as found:
                yield found
        except FileNotFoundError as error:
            raise CinemeshError(f"cannot write {self}: {in_a_line(error)}", remedy=MAKE_BUCKET) from error


def _file_system(url: str, **options: Any) -> tuple[AbstractFileSystem, str]:
    """And the path in it. Loads fsspec, which most commands never need."""
    from fsspec.core import url_to_fs

    return url_to_fs(url, **options)
