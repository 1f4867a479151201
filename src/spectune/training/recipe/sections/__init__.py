"""The sections of a recipe: typed, frozen, with units in the names; unknown keys are errors.

base: what all sections share.
model: [model] and [vae].
data: [data], [data.bucket], [data.caption] and [[data.sets]].
objective: [objective], [loss] and [loss.edm2].
run: [optimizer] and [run].
"""

from spectune.training.recipe.sections.base import OneOf, Section
from spectune.training.recipe.sections.data import (
    BucketSection,
    CaptionSection,
    DataSection,
    ImageSetSection,
    MaskSource,
)
from spectune.training.recipe.sections.model import (
    ALL_PARTS,
    ModelSection,
    PartName,
    Quantization,
    VaeSection,
)
from spectune.training.recipe.sections.objective import Edm2Section, LossSection, ObjectiveSection
from spectune.training.recipe.sections.run import (
    Offloaded,
    OptimizerSection,
    Precision,
    RunSection,
)

__all__ = [
    "ALL_PARTS",
    "BucketSection",
    "CaptionSection",
    "DataSection",
    "Edm2Section",
    "ImageSetSection",
    "LossSection",
    "MaskSource",
    "ModelSection",
    "ObjectiveSection",
    "Offloaded",
    "OneOf",
    "OptimizerSection",
    "PartName",
    "Precision",
    "Quantization",
    "RunSection",
    "Section",
    "VaeSection",
]
