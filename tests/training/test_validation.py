from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spectune.model.network import Sdxl
from spectune.model.prediction import Ddpm, Flow, Prediction
from spectune.training.data.buckets import Buckets, Size
from spectune.training.data.folders import scan_validation
from spectune.training.data.scan import Scan
from spectune.training.denoiser import Denoiser, encode_captions
from spectune.training.recipe.sections.data import DataSection
from spectune.training.validation import encode_validation, validation_loss


@pytest.fixture
def scan(picture_folder: Path) -> Scan:
    scan = scan_validation(
        DataSection(folders=(picture_folder,), validation_folder=picture_folder / "held_out")
    )
    assert scan is not None
    return scan


@pytest.mark.parametrize("prediction", [Ddpm("eps"), Flow(shift=2.5)], ids=lambda prediction: prediction.name)
def test_the_loss_does_not_depend_on_batching_or_the_global_generator(
    model: Sdxl, scan: Scan, prediction: Prediction
) -> None:
    denoiser = Denoiser(model, trains_text=False)
    images = encode_validation(model, scan, Buckets((Size(32, 32),)))
    losses = []
    for batch in (1, 3, 8):
        torch.manual_seed(batch)
        losses.append(validation_loss(denoiser, images, prediction, times=3, batch=batch))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_the_noise_of_an_image_does_not_depend_on_other_images(model: Sdxl, scan: Scan) -> None:
    denoiser = Denoiser(model, trains_text=False)
    alone = [
        validation_loss(
            denoiser,
            encode_validation(model, Scan((image,)), Buckets((Size(32, 32),))),
            Ddpm("eps"),
            times=2,
            batch=4,
        )
        for image in scan.images
    ]
    both = validation_loss(
        denoiser, encode_validation(model, scan, Buckets((Size(32, 32),))), Ddpm("eps"), times=2, batch=4
    )
    assert both == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_cached_captions_equal_computed_ones(model: Sdxl) -> None:
    denoiser = Denoiser(model, trains_text=False)
    captions = ["red", "", "a round shape"]
    computed = denoiser.text_states(captions)
    denoiser.text = encode_captions(model, captions)
    cached = denoiser.text_states(captions)
    torch.testing.assert_close(cached.context, computed.context)
    torch.testing.assert_close(cached.pooled, computed.pooled)
