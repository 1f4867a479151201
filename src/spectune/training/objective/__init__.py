"""The training objective: the target of the network, and the cost of its errors.

* losses:     the table of loss functions; add a loss here
* weightings: the table of weightings of noise levels; add a weighting here
* edm2:       the weighting that is learned during the run
* noising:    noised latents and their targets
* cost:       the product of loss, mask, image weight and noise level weight
* objective:  all of the above for the batches of one run
* building:   the objective of a recipe
"""
