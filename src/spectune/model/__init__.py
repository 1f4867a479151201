"""A running SDXL.

* network: the UNet, text encoders and VAE, built from a checkpoint's tensors.
* prediction: eps, v and flow; noising, targets and x0, shared by training and sampling.
* text: captions to token ids.
* vae_convention: how a VAE scales latents and pads; which declaration wins.
* vae_loading: a VAE from its own file.
* inject: trainable low-rank changes of layers, in the delta or residual form.
* packed_linear: a linear layer in 4 or 8 bits.
* quantize: quantize a model's layers and report the error.
* offload: park unused networks in main memory.
"""
