"""The frames of a run.

* making:  compute frames from the weights, or from their shapes
* aligned: compute frames from the first batches
* refresh: fold the trained changes into the weights, and take the frames anew
"""
