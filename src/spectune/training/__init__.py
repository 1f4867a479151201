"""Train the change of a model's principal spectrum.

* recipe/, data/, optim/, memory/: the recipe, the images, the optimizers, the memory estimate
* callbacks/:      what a run reports: progress bar, TensorBoard
* objective/:      what the network predicts, losses and weightings
* frames/:         compute frames, and take them anew
* eps_to_flow/:    convert an EPS model to a flow model
* loop:            `train` and the main loop
* train_step:      one forward and backward pass, one optimizer step
* setup:           build a run from a recipe
* run:             the records of a run: its setup and its progress
* base_file:       the base of a run: its hash, its checks, its frames
* trainable_model: build a model with trainable changes from files
* tuned_start:     start from the deltas of a tuned adapter
* denoiser:        the trained networks as one module
* validation:      the loss on validation images
* ema:             the moving average of the trained tensors
* output:          the files of a run in its output folder
* state:           saved states; a run resumes from them bit for bit
* interrupt:       stop on Ctrl-C, SIGTERM and a closed terminal
* saving/:         when a run saves, validates and draws, and the disk space of its saves
* seeds:           derive every random choice from one seed
"""
