"""Maps the repository root to the package ``cinemesh``; everything else is in pyproject.toml.

Flat top-level names such as ``kernels`` and ``model`` collide with packages that people have
installed, so the folders are subpackages, and their parent is the root itself.
"""

import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = (
    "kernels",
    *("parallel", "parallel/ir", "parallel/layers", "parallel/passes", "parallel/runtime"),
    *("model", "model/tae"),
    *("data", "data/cache", "data/curate", "data/encoders"),
    *("perf_model", "perf_model/clusters", "perf_model/prices", "perf_model/search", "perf_model/report"),
    *("perf_model/published", "perf_model/calibration"),
    *("evaluation", "evaluation/rewriting"),
    *(
        "launch",
        "launch/training",
        "launch/training/checkpoint",
        "launch/training/in_memory",
        "launch/commands",
        "launch/proof",
    ),
    *(
        "launch/storage",
        "launch/cluster",
        "launch/jobs",
        "launch/health",
        "launch/acceptance",
        "launch/exchange",
        "launch/doors",
        "launch/tae",
    ),
    "configs",
)
PACKAGES = {"cinemesh": ".", **{f"cinemesh.{folder.replace('/', '.')}": folder for folder in FOLDERS}}


class BuildPackage(build_py):
    """Copies the package alone: no setup.py, and nothing that an earlier build left behind."""

    def run(self) -> None:
        """Start from an empty build folder: what it still holds would be shipped."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The (package, module, file) triples to copy."""
        found = super().find_package_modules(package, package_dir)
        return [triple for triple in found if triple[1] != "setup"]


setup(
    packages=[*PACKAGES],
    package_dir=PACKAGES,
    package_data={
        "cinemesh.configs": ["*.yaml", "*/*.yaml", "*.safetensors"],
        "cinemesh.data.curate": ["*.yaml", "presets/*.yaml", "templates/*.html"],
        "cinemesh.kernels": ["tuning/*.yaml", "rates/*.yaml"],
        "cinemesh.launch.jobs": ["*.sh"],
        "cinemesh.evaluation": ["*.yaml", "templates/*.html"],
        "cinemesh.evaluation.rewriting": ["*.yaml", "guidelines/*.yaml"],
        "cinemesh.perf_model.clusters": ["*.yaml", "*.csv"],
        "cinemesh.perf_model.published": ["*.yaml", "*.csv"],
        "cinemesh.perf_model.report": ["templates/*.html"],
    },
    include_package_data=False,  # or every file of the root counts as data of the package
    cmdclass={"build_py": BuildPackage},
)
