"""Run in a process of its own: import the nodes and run the commands on files without the packages of extras.

The working folder has a checkpoint base.safetensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from spectune.extras import EXTRA_OF
from tests.comfyui_nodes import fakes

# What ComfyUI lacks, and the nodes must not import either.
NOT_IN_COMFYUI = {"typer", "rich", "platformdirs"}
COMMANDS = """
inspect base.safetensors
split base.safetensors --rank 2 -o .
verify base.safetensors base.residual.safetensors base.principal-r2.safetensors
null base.safetensors -o null.safetensors
merge base.safetensors:0.5 null.safetensors -o merged.safetensors
export base.safetensors merged.safetensors --rank 2 -o lora.safetensors
slice lora.safetensors:te -o slice.safetensors --base base.safetensors
convert lora.safetensors --keys diffusers -o peft.safetensors --base base.safetensors
rebuild base.safetensors lora.safetensors -o rebuilt.safetensors
sample base.safetensors -o pictures
inspect base.safetensors --plot spectrum.png
"""


class Blocker:
    """An import hook for which some packages are not installed."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def main() -> None:
    loaded = set(EXTRA_OF) & set(sys.modules)  # by torch, and by the fakes of ComfyUI
    blocker = Blocker(set(EXTRA_OF) - loaded | NOT_IN_COMFYUI)
    sys.meta_path.insert(0, blocker)
    with pytest.MonkeyPatch.context() as patch:
        fakes.install(fakes.Comfy(Path()), patch)
        nodes = fakes.load_package(fakes.ROOT / "comfyui_nodes", fakes.NODES)
    print("nodes", len(nodes.NODE_CLASS_MAPPINGS))
    blocker.names -= NOT_IN_COMFYUI
    from spectune.cli.app import run

    for line in COMMANDS.strip().splitlines():
        words = line.split()
        print(words[0], run(words))
    print("blocked", *sorted(blocker.names))


if __name__ == "__main__":
    main()
