"""``torchrun ... -m cinemesh.launch.verify --plan PLAN``: ``cinemesh verify``, where the plan will run."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "verify")
    main()
