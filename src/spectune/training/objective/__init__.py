"""What the network is trained to predict, and what an error costs.

* losses:     the table of loss functions; add a loss here
* weightings: the table of weightings of noise levels; add a weighting here
* edm2:       the weighting that is learned during the run
* noising:    clean latents to noised latents with their target
* cost:       loss, mask, image weight and noise level weight combined
* objective:  all of the above for the batches of one run
"""
