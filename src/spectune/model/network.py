"""A running SDXL, built from the tensors of a checkpoint. No configuration file is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import AutoencoderDC, AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spectune.errors import InputError, counted
from spectune.files.source import WeightSource, declared_prediction, declared_zero_snr
from spectune.model.device import send
from spectune.model.prediction import Prediction, make_prediction
from spectune.model.text import TokenIds, tokenize
from spectune.model.vae.packing import pack, unpack
from spectune.model.vae.tiles import TILE_PX, in_tiles
from spectune.sdxl.inference import infer_layout
from spectune.sdxl.layout import Layout, PartName, TextLayout, UNetLayout, VaeLayout
from spectune.sdxl.names import Part, module_path
from spectune.sdxl.prediction_type import check_prediction
from spectune.sdxl.state_dicts import module_tensors
from spectune.sdxl.vocabulary import BOS_ID, EOS_ID, MAX_TOKENS

Autoencoder = AutoencoderKL | AutoencoderDC  # that of FLUX.2 is an AutoencoderKL with statistics


@dataclass(frozen=True)
class TextStates:
    """The outputs of both text encoders for a batch of captions.

    A context shorter than the longest of its batch is filled up with zeros, which `mask` excludes from
    attention. The prediction for a caption thus does not depend on the others.
    """

    context: Tensor  # (batch, tokens, te1 width + te2 width)
    pooled: Tensor  # (batch, te2 projection)
    mask: Tensor | None = None  # (batch, tokens), 1 for tokens and 0 for filling; None: all 1

    def to(self, device: torch.device | str) -> TextStates:
        """Return the states on a device."""
        mask = None if self.mask is None else send(self.mask, device)
        return TextStates(send(self.context, device), send(self.pooled, device), mask)


def stack_states(states: Sequence[TextStates]) -> TextStates:
    """Return the states of single captions, context (tokens, width) and pooled (width,), as a batch."""
    contexts = [state.context for state in states]
    pooled = torch.stack([state.pooled for state in states])
    if len({len(context) for context in contexts}) == 1:
        return TextStates(torch.stack(contexts), pooled)
    mask = pad_sequence([context.new_ones(len(context)) for context in contexts], batch_first=True)
    return TextStates(pad_sequence(contexts, batch_first=True), pooled, mask)


@dataclass(frozen=True)
class Sdxl:
    """The four networks of an SDXL checkpoint, their layout and their prediction type."""

    unet: UNet2DConditionModel
    te1: CLIPTextModel
    te2: CLIPTextModelWithProjection
    vae: Autoencoder | None
    layout: Layout
    prediction: Prediction
    vae_tiles: bool = False  # run the autoencoder on overlapping tiles of one picture at a time

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def pixels_per_latent(self) -> int:
        """Edge length in pixels of one latent (8 in SDXL)."""
        return self._vae_layout.pixels_per_latent

    @property
    def size_step(self) -> int:
        """The number of pixels that the sides of pictures are multiples of."""
        if self.layout.vae is None:
            raise no_vae()
        return self.layout.size_step

    def encode_text(self, ids: TokenIds) -> TextStates:
        """Encode captions.

        The context concatenates the penultimate states of both encoders, and the chunks of a caption with
        their start and end tokens, as ComfyUI does. The pooled output is the projection of the second
        encoder's last state at the first end token of the first chunk.
        """
        first = self.te1(ids.te1.to(self.te1.device), output_hidden_states=True).hidden_states[-2]
        second = self.te2(ids.te2.to(self.te2.device), output_hidden_states=True)
        context = torch.cat([first, second.hidden_states[-2]], dim=-1)
        if ids.chunks is None or ids.is_single:
            return TextStates(context=context, pooled=second.text_embeds)
        contexts, pooled = context.split(list(ids.chunks)), second.text_embeds.split(list(ids.chunks))
        return stack_states(
            [TextStates(rows.flatten(0, 1), own[0]) for rows, own in zip(contexts, pooled, strict=True)]
        )

    def encode_captions(self, captions: Sequence[str], *, max_tokens: int = MAX_TOKENS) -> TextStates:
        """Encode captions in chunks of 75 tokens; cut those with more than `max_tokens`."""
        return self.encode_text(tokenize(captions, self.layout.te1.context, max_tokens=max_tokens))

    def denoise(self, noised: Tensor, timestep: Tensor, text: TextStates, time_ids: Tensor) -> Tensor:
        """Run the UNet on latents (batch, channels, h, w); `time_ids` are (batch, 6), in pixels, float32."""
        added = {"text_embeds": text.pooled, "time_ids": time_ids}
        output = self.unet(
            noised, timestep, text.context, added_cond_kwargs=added, encoder_attention_mask=text.mask
        )
        return output.sample

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode pixels (batch, 3, H, W) in -1..1 to scaled float32 latents.

        With a generator, the latents are a sample of the posterior. Otherwise they are its mode.
        """
        mean, deviation = self.encode_posteriors(pixels).chunk(2, dim=1)
        if generator is None:
            return mean
        return mean + deviation * torch.randn(mean.shape, generator=generator).to(mean.device)

    def encode_posteriors(self, pixels: Tensor) -> Tensor:
        """Return the mean and the standard deviation of scaled latents, (batch, 2 * channels, h, w) float32.

        `pixels` are (batch, 3, H, W) in -1..1.
        """
        vae, layout = self._vae, self._vae_layout
        step = layout.pixels_per_z

        def encode(part: Tensor) -> Tensor:
            mean, deviation = _posterior(vae, part)
            if layout.packed is None:
                mean, deviation = (mean - layout.shift) * layout.scale, deviation * layout.scale
            return torch.cat([mean, deviation], dim=1)

        pixels = pixels.to(vae.device, vae.dtype)
        if not self.vae_tiles:
            encoded = encode(pixels)
        else:
            encoded = in_tiles(encode, pixels, edge=TILE_PX, network=vae, step=step)
        if layout.packed is None:
            return encoded
        mean, deviation = encoded.chunk(2, dim=1)
        return torch.cat(pack(mean, deviation, layout.packed), dim=1)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to float32 pixels (batch, 3, H, W) in -1..1."""
        vae, layout = self._vae, self._vae_layout

        def decode(part: Tensor) -> Tensor:
            return cast("Any", vae).decode(part).sample.float().clamp(-1, 1)

        if layout.packed is None:
            raw = (latents / layout.scale + layout.shift).to(vae.dtype)
        else:
            raw = unpack(latents, layout.packed).to(vae.dtype)
        edge = TILE_PX // layout.pixels_per_z
        return in_tiles(decode, raw, edge=edge, network=vae) if self.vae_tiles else decode(raw)

    def place(self, layer_name: str) -> tuple[nn.Module, str]:
        """Return the parent module and the attribute of a layer, by its name in the catalogue.

        Raises:
            InputError: The model has no such layer.
        """
        try:
            part, path = module_path(layer_name, self.layout.unet)
        except KeyError as error:
            raise InputError(f"the model has no layer {layer_name}") from error
        root = {Part.UNET: self.unet, Part.TE1: self.te1, Part.TE2: self.te2}[part]
        parent, _, attribute = path.rpartition(".")
        try:
            return root.get_submodule(parent), attribute
        except AttributeError as error:
            raise InputError(f"the model has no layer {layer_name}") from error

    @property
    def _vae(self) -> Autoencoder:
        if self.vae is None:
            raise no_vae()
        return self.vae

    @property
    def _vae_layout(self) -> VaeLayout:
        if self.layout.vae is None:
            raise no_vae()
        return self.layout.vae


def _posterior(vae: Autoencoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of z, float32. An AutoencoderDC has no deviation."""
    encoded = cast("Any", vae.encode(pixels))
    if isinstance(vae, AutoencoderDC):
        mean = encoded.latent.float()
        return mean, torch.zeros_like(mean)
    return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()


def no_vae() -> InputError:
    """Return the error for a checkpoint without a VAE."""
    return InputError(
        "the checkpoint has no VAE",
        hint="pass the file of a VAE (`vae`; in a recipe vae.path), or add one to the checkpoint with "
        "`spectune slice MODEL:unet MODEL:te OTHER:vae -o whole.safetensors`",
    )


def build_model(
    source: WeightSource,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Sdxl:
    """Build a model from a checkpoint, frozen and in eval mode.

    The autoencoder is float32, because SDXL's own one overflows in float16.

    Raises:
        InputError: Tensors are missing, or their shapes do not match the layout.
    """
    check_prediction(source)
    layout = infer_layout(source)
    with init_empty_weights(include_buffers=False):
        unet = new_unet(layout.unet)
        te1 = CLIPTextModel(text_config(layout.te1))
        te2 = CLIPTextModelWithProjection(text_config(layout.te2))
        vae = None if layout.vae is None else new_vae(layout.vae)
    _load_part(unet, "unet", source, layout, device, dtype)
    _load_part(te1, "te1", source, layout, device, dtype)
    _load_part(te2, "te2", source, layout, device, dtype)
    if vae is not None:
        _load_part(vae, "vae", source, layout, device, torch.float32)
    return Sdxl(unet=unet, te1=te1, te2=te2, vae=vae, layout=layout, prediction=source_prediction(source))


def source_prediction(source: WeightSource) -> Prediction:
    """Return the prediction type that a checkpoint declares. The default is eps.

    As in ComfyUI, a tensor `ztsnr` declares a schedule with zero terminal SNR.
    """
    shift = source.provenance.flow_shift
    return make_prediction(
        declared_prediction(source) or "eps",
        flow_shift=1.0 if shift is None else shift,
        zero_terminal_snr=declared_zero_snr(source),
    )


def _load_part(
    module: nn.Module,
    part: PartName,
    source: WeightSource,
    layout: Layout,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    views = module_tensors(layout, part, source)
    state = {key: view.load(source).to(device, dtype) for key, view in views.items()}
    hint = "`spectune inspect` shows what the file holds"
    fill(module, state, label=part, architecture="SDXL's architecture", hint=hint)
    module.to(device)  # buffers


def fill(module: nn.Module, state: Mapping[str, Tensor], *, label: str, architecture: str, hint: str) -> None:
    """Load the weights of a module on the meta device, freeze it and set eval mode.

    Raises:
        InputError: The names or shapes in `state` do not match the module.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        first = wrong[0]
        raise InputError(
            f"{label} differs from {architecture} in {counted(len(wrong), 'tensor')}; first {first}: "
            f"expected {expected.get(first, 'nothing')}, got {found.get(first, 'nothing')}",
            hint=hint,
        )
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()


def new_unet(layout: UNetLayout) -> UNet2DConditionModel:
    """Return a UNet with text_time conditioning, initialized by diffusers."""
    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in layout.depths)
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(layout.depths))
    # a dictionary, because diffusers annotates its tuples with one element
    sizes: dict[str, Any] = {
        "in_channels": layout.in_channels,
        "out_channels": layout.out_channels,
        "block_out_channels": layout.channels,
        "down_block_types": down,
        "up_block_types": up,
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in layout.depths),
        "attention_head_dim": layout.heads,  # diffusers' name for the number of heads
        "cross_attention_dim": layout.context,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": layout.time_id_channels,
        "projection_class_embeddings_input_dim": layout.pooled + 6 * layout.time_id_channels,
        "layers_per_block": layout.resnets,
        "norm_num_groups": layout.norm_groups,
    }
    unet = UNet2DConditionModel(**sizes)
    unet.set_attn_processor(cast("Any", PlainAttention()))
    return unet


class PlainAttention:
    """The attention of a transformer block of the UNet, (batch, tokens, channels).

    The processor of diffusers also divides the result by 1, which is a kernel launch in each forward,
    recomputation and backward pass: 420 in a step of SDXL.
    """

    def __call__(
        self,
        attention: Any,  # diffusers' Attention, whose types are incomplete
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        x, heads = hidden_states, attention.heads
        context = x if encoder_hidden_states is None else encoder_hidden_states
        mask = None
        if attention_mask is not None:
            mask = attention.prepare_attention_mask(attention_mask, context.shape[1], len(x))
            mask = mask.view(len(x), heads, -1, mask.shape[-1])
        projected = (attention.to_q(x), attention.to_k(context), attention.to_v(context))
        query, key, value = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in projected)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out, dropout = attention.to_out
        return dropout(out(mixed.transpose(1, 2).flatten(2)))


def text_config(layout: TextLayout) -> CLIPTextConfig:
    """Return the transformers configuration of one text encoder."""
    return CLIPTextConfig(
        vocab_size=layout.vocab,
        max_position_embeddings=layout.context,
        hidden_size=layout.width,
        intermediate_size=layout.mlp,
        num_hidden_layers=layout.layers,
        num_attention_heads=layout.heads,
        hidden_act=layout.activation,
        projection_dim=layout.projection or layout.width,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def new_vae(layout: VaeLayout) -> Autoencoder:
    """Return an autoencoder, initialized by diffusers."""
    if layout.deep_config is not None:
        return cast(AutoencoderDC, AutoencoderDC.from_config(json.loads(layout.deep_config)))
    levels = len(layout.channels)
    sizes: dict[str, Any] = {
        "block_out_channels": layout.channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": layout.resnets,
        "norm_num_groups": layout.norm_groups,
        "latent_channels": layout.latent_channels,
        "use_quant_conv": layout.quant_convs,
        "use_post_quant_conv": layout.quant_convs,
    }
    return AutoencoderKL(**sizes)


# ---------------------------------------------------------------- the memory of drawing

DRAWING_BATCH = 4  # pictures


def denoising_bytes(layout: UNetLayout, area: int, itemsize: int) -> int:
    """Return the peak bytes of the tensors of the UNet, for latents of the area (rows * height * width)."""
    return 16 * layout.channels[0] * area * itemsize


def pictures_at_once(pixels: int) -> int:
    """Return the number of pictures of an area that a preview samples at once: 1024 px squared, or one.

    Sampling should need less memory than a training step.
    """
    return min(DRAWING_BATCH, max(1, 1024 * 1024 // pixels))
