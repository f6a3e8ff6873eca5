"""The ``cinemesh`` command: hears Ctrl-C before it imports what takes time (torch-free)."""

import gc

from ..interrupt import interrupted_in_a_line


def enter() -> None:
    """Run the command line. What is left behind goes with the process: nobody looks for garbage in it."""
    with interrupted_in_a_line(last=True):
        from .cli import main

        try:
            main()
        finally:
            gc.freeze()


if __name__ == "__main__":
    enter()
