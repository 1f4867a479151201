"""A running SDXL.

* network: the UNet, text encoders and VAE, built from a checkpoint's tensors.
* prediction: noising, targets and x0 for eps, v and flow, shared by training and sampling.
* noise_levels: the distributions of noise levels that flow is trained on.
* text: convert captions to token ids.
* vae: scale, shift and padding of a VAE, and loading one from its own file.
* inject: trainable low-rank changes of layers, in the delta or residual form.
* joined_factors: the factors of all changes in the dtype of the activations, made once per step.
* frozen_linear: a linear layer that has its weight on the device only while a product uses it.
* packed_linear: such a layer with a weight in 4 or 8 bits.
* quantize: quantize the layers of a model and report the error.
* offload: keep unused networks in main memory.
* weight_stream: keep weights in main memory and copy each to the GPU shortly before its use.
* streamed_layers: the layers whose weights are streamed.
* device: the devices of this machine.
"""
