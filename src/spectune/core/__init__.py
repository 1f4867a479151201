"""The mathematics of spectune on single weights: tensors in, tensors out, torch only.

* `delta`: the formula W' = W + dB (A0+dA) + B0 dA, derived and implemented once, with its gradients
* `low_rank`: a pair of factors, the weight shapes it stands for, and the product up @ down
* `split`: a weight = principal factors + residual
* `residual`: subtract the principal from a weight, and add it back
* `frames`: the frames (A0, B0) that training can start from
* `lora`: the change of a layer as factors for the original weight; their errors
* `combine`: the sum of layers of several adapters
* `svd`, `sketch`: the largest singular triplets, exact or from a randomized iteration
* `spectrum`, `rank`: all singular values, and the ranks chosen from them
* `agreement`: bit-equal shares and ulps between a tensor and the one it should equal
* `rounding`: float32 to the dtype of a file, with range and NaN checks
* `linalg`: typed matrix functions, norms, and scratch memory
"""
