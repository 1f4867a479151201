"""The kinds of input that are tried. Each target is one row in TARGETS."""

from __future__ import annotations

from tests.fuzz.harness import Target
from tests.fuzz.targets.commands import Commands
from tests.fuzz.targets.models import Adapters, Folders, Models
from tests.fuzz.targets.pictures import Captions, Pictures
from tests.fuzz.targets.states import States
from tests.fuzz.targets.tensor_files import Metadata, TensorFiles
from tests.fuzz.targets.texts import Kohya, Recipes

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        TensorFiles(),
        Metadata(),
        Models(),
        Adapters(),
        Folders(),
        Recipes(),
        Kohya(),
        Captions(),
        Pictures(),
        States(),
        Commands(),
    )
}
