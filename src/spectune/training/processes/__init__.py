"""Several processes that train one model: PyTorch's DistributedDataParallel through accelerate.

engine: starts the processes' communication; refuses engines that would train something else
agreement: all processes have the same input, or all of them stop with the same message
sharing: layers to split, images, captions and validation are divided among the processes
stopping: a signal that reaches one process ends all of them
"""
