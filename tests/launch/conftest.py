"""The fixtures of runs, for the tests of this folder."""

from training import clips as clips
from training import one_process as one_process
from training import values as values
from training import written_at_once as written_at_once
