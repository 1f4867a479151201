"""Train the change of a model's principal spectrum.

* recipe/, data/, optim/, memory/: the recipe, the images, the optimizers, the memory estimate
* objective/:      what the network predicts, losses and weightings
* eps_to_flow/:    how an EPS model becomes a flow model
* loop:            `train`, from a recipe to its files; the main loop
* train_step:      one forward and backward pass, one optimizer step
* setup:           everything in place for the first step
* run:             the records of a run: its setup and its progress
* trainable_model: files to a model with trainable changes
* aligned_frames:  frames that the first batches determine
* denoiser:        the trained networks as one module
* validation:      the loss on validation images
* ema:             the moving average of the trained tensors
* output:          the files of a run in its output folder
* state:           saved states, from which a run continues bit for bit
* callbacks:       progress bar, TensorBoard, previews
* interrupt:       Ctrl-C and SIGTERM
* seeds:           all random choices derived from one seed
"""
