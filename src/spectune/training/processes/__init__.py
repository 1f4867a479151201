"""Several processes that train one model: PyTorch's DistributedDataParallel through accelerate.

engine: starts the processes' communication; refuses engines that would train something else
agreement: all processes have the same input, or all of them stop with the same message
sharing: images, captions and validation are divided among the processes
"""
