"""The ``cinemesh`` command: hears Ctrl-C before it imports what takes time (torch-free)."""

from ..interrupt import interrupted_in_a_line


def enter() -> None:
    """Run the command line."""
    with interrupted_in_a_line(last=True):
        from .cli import main

        main()


if __name__ == "__main__":
    enter()
