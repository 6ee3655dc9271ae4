"""The step of a build that puts recipes/, which lies beside the package, into the package of the wheel.

setuptools runs it by the line ``cmdclass`` in pyproject.toml. An editable installation needs no copy: there,
deus_merge/recipe/shipped.py reads the folder itself.
"""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_py import build_py

RECIPES = ("recipes/*.yml", "recipes/*.ipynb", "recipes/training/*.py")
SOURCES = ("docs/*", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "constraints.txt", "mkdocs.yml")


class BuildPy(build_py):
    """``build_py``, and the recipes."""

    def recipes(self) -> dict[str, str]:
        """File in the build -> file in the sources."""
        found = sorted(path.as_posix() for pattern in RECIPES for path in Path().glob(pattern))
        if not found:
            raise FileNotFoundError("recipes/ has no files: build in the root of the sources")
        return {str(Path(self.build_lib, "deus_merge", name)): name for name in found}

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for target, source in self.recipes().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return super().get_outputs(include_bytecode) + ([] if self.editable_mode else list(self.recipes()))

    def get_output_mapping(self) -> dict[str, str]:
        return super().get_output_mapping() | ({} if self.editable_mode else self.recipes())

    def get_source_files(self) -> list[str]:
        """What the sdist takes along: docs and changelog, and all that a wheel is built from."""
        more = (path for pattern in SOURCES for path in sorted(Path().glob(pattern)) if path.is_file())
        return [*super().get_source_files(), *self.recipes().values(), *(path.as_posix() for path in more)]
