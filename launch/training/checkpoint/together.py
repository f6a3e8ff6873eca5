"""Work that every rank does, and that failed on all when it failed on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ....errors import CinemeshError
from ....parallel.runtime.comm import first_of
from ....parallel.runtime.mesh import Mesh

T = TypeVar("T")


def together(mesh: Mesh | None, work: Callable[[], T]) -> T:
    """``work()`` on every rank; when it fails on one, every rank raises what the first of those says. Collective."""
    if mesh is None:
        return work()
    try:
        result = work()
    except CinemeshError as error:
        failure = first_of(error)
        assert failure is not None
        raise failure from error
    except Exception as error:
        first_of(CinemeshError(str(error)))
        raise
    failure: CinemeshError | None = first_of(None)
    if failure is not None:
        raise failure
    return result
