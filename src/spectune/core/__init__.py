"""The mathematics of spectune on single weights: functions from tensors to tensors that need only torch.

* `delta`: the formula W' = W + dB (A0+dA) + B0 dA, its derivation and its gradients
* `low_rank`: a pair of factors, the shape of their weight, and the product up @ down
* `split`: a weight = principal factors + residual
* `residual`: subtract the principal from a weight, and add it back
* `frames`: the frames (A0, B0) that training can start from
* `lora`: the change of a layer as factors for the original weight, and their errors
* `combine`: the sum of layers of several adapters
* `svd`, `sketch`: the largest singular triplets, exact or by a randomized iteration
* `spectrum`, `rank`: all singular values, and the ranks chosen from them
* `agreement`: the share of equal bits and the ulps between a tensor and its expected values
* `rounding`: float32 to the dtype of a file, with range and NaN checks
* `linalg`: typed matrix functions, norms, and scratch memory
"""
