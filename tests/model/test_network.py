"""A model built from the tensors of a checkpoint, without configuration files."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from spectune.errors import InputError
from spectune.files.source import MemorySource
from spectune.model.network import PlainAttention, build_model
from spectune.model.prediction import Ddpm
from spectune.model.text import TokenIds, clip_tokenizer, tokenize


@pytest.fixture(scope="module")
def model(source):
    return build_model(source)


def test_every_stage_runs(model):
    text = model.encode_text(tokenize(["a cat", ""], model.layout.te1.context))
    assert text.context.shape == (2, model.layout.te1.context, model.layout.unet.context)
    assert text.pooled.shape == (2, model.layout.unet.pooled)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = model.encode_images(pixels)
    edge = 32 // model.pixels_per_latent
    assert latents.shape == (2, 4, edge, edge)
    out = model.denoise(latents, torch.tensor([10, 900]), text, torch.zeros(2, 6))
    assert out.shape == latents.shape
    assert torch.isfinite(out).all()
    assert model.decode_latents(latents).shape == pixels.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_that_of_diffusers(model, dtype):
    unet = deepcopy(model.unet).to(dtype)
    blocks = [module for module in unet.modules() if isinstance(module, Attention)]
    assert {block.rescale_output_factor for block in blocks} == {1.0}
    x = torch.randn(2, 9, blocks[1].to_q.in_features, dtype=dtype)
    context = torch.randn(2, 7, blocks[1].to_k.in_features, dtype=dtype)
    mask = torch.zeros(2, 1, 7, dtype=dtype)
    mask[1, 0, 4:] = -10000.0
    for attention, inputs in ((blocks[0], (x, None, None)), (blocks[1], (x, context, mask))):
        with torch.no_grad():
            ours = attention(*inputs)
            assert torch.equal(ours, AttnProcessor2_0()(attention, *inputs))
            assert isinstance(attention.processor, PlainAttention)


def test_modules_hold_the_weights_of_the_file(model, source):
    block = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    attention = model.te2.text_model.encoder.layers[0].self_attn
    joined = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(joined, source.load(block).float())
    projection = source.load("conditioner.embedders.1.model.text_projection").float()
    assert torch.equal(model.te2.text_projection.weight, projection.T)


def test_place_finds_every_layer_of_the_catalogue(model, source):
    from spectune.sdxl.layers import build_catalogue, layer_weight

    for layer in build_catalogue(source, all_layers=True):
        parent, attribute = model.place(layer.name)
        assert torch.equal(getattr(parent, attribute).weight, layer_weight(source, layer).float()), layer.name


def test_an_unknown_layer_is_an_error(model):
    with pytest.raises(InputError, match=r"the model has no layer unet\.nowhere"):
        model.place("unet.nowhere")


def test_the_prediction_type_comes_from_the_metadata(source):
    assert build_model(source).prediction.name == "eps"
    flow = {**source.metadata, "spectune.prediction": "flow", "spectune.flow_shift": "2.5"}
    prediction = build_model(MemorySource(source.values, flow)).prediction
    assert (prediction.name, prediction.shift) == ("flow", 2.5)


def test_a_missing_tensor_is_named(source):
    values = dict(source.values)
    del values["model.diffusion_model.out.2.bias"]
    with pytest.raises(InputError, match=r"out\.2\.bias"):
        build_model(MemorySource(values, source.metadata))


def test_a_wrong_shape_is_named(source):
    name = "model.diffusion_model.time_embed.2.bias"
    values = {**source.values, name: torch.zeros(3, dtype=torch.float16)}
    with pytest.raises(InputError, match=r"time_embedding\.linear_2\.bias: expected \(\d+,\), got \(3,\)"):
        build_model(MemorySource(values, source.metadata))


def test_text_states_match_the_diffusers_pipeline(model):
    """Compare with StableDiffusionXLPipeline.encode_prompt, which uses our tokenizer for both encoders."""
    pipeline = oracle_pipeline(model)
    captions = ["a cat", "a red fox in the snow"]  # no "!": the second tokenizer of diffusers pads with it
    for caption in captions:
        context, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        ours = model.encode_text(tokenize([caption], model.layout.te1.context))
        torch.testing.assert_close(ours.context, context)
        torch.testing.assert_close(ours.pooled, pooled)


def test_long_captions_match_the_encoders_run_on_each_chunk(model):
    """Build the states of 231 tokens (225, and three start and end tokens) with transformers alone."""
    captions = [", ".join(f"detail {n}" for n in range(60)), "dog " * 80, "a cat", ""]
    states = model.encode_captions(captions)
    assert states.context.shape[:2] == (4, 231)
    for row, caption in enumerate(captions):
        words = clip_tokenizer()(caption)["input_ids"][1:-1]
        contexts, pooled = [], []
        for start in range(0, max(len(words[:225]), 1), 75):
            chunk = [49406, *words[:225][start : start + 75], 49407]
            first = model.te1(
                torch.tensor([[*chunk, *[49407] * (77 - len(chunk))]]), output_hidden_states=True
            )
            second = model.te2(torch.tensor([[*chunk, *[0] * (77 - len(chunk))]]), output_hidden_states=True)
            contexts.append(torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)[0])
            pooled.append(second.text_embeds[0])
        tokens = 77 * len(contexts)
        torch.testing.assert_close(states.context[row, :tokens], torch.cat(contexts), rtol=0, atol=1e-6)
        torch.testing.assert_close(states.pooled[row], pooled[0], rtol=0, atol=1e-6)
        assert states.mask is not None
        assert states.mask[row].tolist() == [1.0] * tokens + [0.0] * (231 - tokens)
        assert not states.context[row, tokens:].any()


def test_a_prediction_does_not_depend_on_the_other_captions_of_its_batch(model):
    """Also checks that the mask has an effect: without it, the filling changes the prediction."""
    noised = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids, time = torch.full((2, 6), 64.0), torch.tensor([500, 500])
    texts = model.encode_captions(["a cat", "dog " * 200])
    together = model.denoise(noised, time, texts, ids)
    for row, caption in enumerate(["a cat", "dog " * 200]):
        alone = model.denoise(noised[row : row + 1], time[:1], model.encode_captions([caption]), ids[:1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    unmasked = model.denoise(noised, time, replace(texts, mask=None), ids)
    assert (unmasked[0] - together[0]).abs().max() > 1e-3


def test_short_captions_have_one_chunk_and_the_states_of_before(model):
    states = model.encode_captions(["a cat", ""])
    ids = tokenize(["a cat", ""], max_tokens=75)
    first = model.te1(ids.te1, output_hidden_states=True).hidden_states[-2]
    second = model.te2(ids.te2, output_hidden_states=True)
    assert states.mask is None
    assert torch.equal(states.context, torch.cat([first, second.hidden_states[-2]], dim=-1))
    assert torch.equal(states.pooled, second.text_embeds)


def oracle_pipeline(model):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    from spectune.model.text import clip_tokenizer

    first = clip_tokenizer()
    vocabulary = first.get_vocab()
    merges = [tuple(merge) for merge in first._merges]
    second = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token="!")
    first.model_max_length = second.model_max_length = 77
    return StableDiffusionXLPipeline(
        vae=model.vae,
        text_encoder=model.te1,
        text_encoder_2=model.te2,
        tokenizer=first,
        tokenizer_2=second,
        unet=model.unet,
        scheduler=EulerDiscreteScheduler(),
    )


def test_the_pooled_state_is_read_at_the_first_end_token(model):
    ids = tokenize(["a cat"], model.layout.te1.context)
    twice = ids.te2.clone()
    twice[0, 10] = 49407
    state = model.te2.text_model(twice).last_hidden_state[0, 3]
    torch.testing.assert_close(
        model.encode_text(TokenIds(ids.te1, twice)).pooled[0], model.te2.text_projection(state)
    )


def test_latents_are_shifted_and_scaled(source):
    """Check latents = (z - shift) * scale with the values of the EQ-D-VR autoencoder."""
    metadata = {**source.metadata, "spectune.vae_scale": "0.1406", "spectune.vae_shift": "-0.4743"}
    model = build_model(MemorySource(source.values, metadata))
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    z = model.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(model.encode_images(pixels), (z + 0.4743) * 0.1406)
    torch.testing.assert_close(
        model.decode_latents((z + 0.4743) * 0.1406),
        model.vae.decode(z).sample.clamp(-1, 1),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_tensor_ztsnr_declares_zero_terminal_snr(source):
    values = {**source.values, "ztsnr": torch.zeros(()), "v_pred": torch.zeros(())}
    metadata = {key: value for key, value in source.metadata.items() if "prediction" not in key}
    assert build_model(MemorySource(values, metadata)).prediction == Ddpm("v", zero_terminal_snr=True)
