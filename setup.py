"""Maps the repository root to the package ``cinemesh``; everything else is in pyproject.toml.

Flat top-level names such as ``kernels`` and ``model`` collide with packages that people have
installed, so the folders are subpackages, and their parent is the root itself.
"""

import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("kernels", "parallel", "model", "perf_model", "launch", "configs")


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
    packages=["cinemesh", *(f"cinemesh.{folder}" for folder in FOLDERS)],
    package_dir={"cinemesh": ".", **{f"cinemesh.{folder}": folder for folder in FOLDERS}},
    package_data={
        "cinemesh.configs": ["*.yaml"],
        "cinemesh.kernels": ["tuning/*.yaml"],
        "cinemesh.perf_model": ["clusters/*.yaml", "clusters/*.csv", "published/*.yaml", "templates/*.html"],
    },
    include_package_data=False,  # or every file of the root counts as data of the package
    cmdclass={"build_py": BuildPackage},
)
