"""Copy what lies outside the package into the wheel: recipes/ and the embedded model.

Everything else about the build is in pyproject.toml. `ln_removal.files.resources` finds these files in a wheel under the
names below, and in a checkout (or an editable installation) where they lie.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DATA = {
    # in the wheel: (in the checkout, files taken, a file that must be among them)
    "ln_removal/_recipes": ("recipes", "**/*.toml", "tiny.toml"),
    "ln_removal/_checkpoints/tiny-gpt2": ("checkpoints/tiny-gpt2", "*", "config.json"),
}


class BuildWithData(build_py):
    """build_py, then the data files; an editable installation reads them in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, target in self._data_files():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else outputs + [str(target) for _, target in self._data_files()]

    def _data_files(self) -> list[tuple[Path, Path]]:
        pairs = []
        for inside, (outside, pattern, marker) in DATA.items():
            source = ROOT / outside
            files = sorted(path.relative_to(source) for path in source.glob(pattern) if path.is_file())
            if Path(marker) not in files:
                raise SystemExit(f"cannot build: {outside}/{marker} is missing; build from a complete checkout")
            pairs += [(source / path, Path(self.build_lib) / inside / path) for path in files]
        return pairs


setup(cmdclass={"build_py": BuildWithData})
