"""Turn an EPS model into a flow model.

* bridge:     exact algebra that reads an EPS model as a flow model
* conversion: teacher, fading bridge and replaced tensors of one run
* warm_start: closed-form fit of the few layers that depend on the noise level
"""
