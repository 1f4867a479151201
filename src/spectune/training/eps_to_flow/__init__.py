"""Turn an EPS model into a flow model.

* bridge:     the velocity of an EPS model, by exact algebra
* conversion: how a run uses teacher, bridge and replaced tensors
* warm_start: a closed-form fit of the layers that depend on the noise level
"""
