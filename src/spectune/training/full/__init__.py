"""Full fine-tuning (`model.rank = "full"`): complete tensors of the model are trained.

whole_tensors: which tensors are trained, and their values by the names of a checkpoint.
steps: whether the optimizer steps in the backward pass, and what the other way costs.
"""
