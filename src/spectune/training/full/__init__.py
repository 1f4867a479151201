"""Full fine-tuning (`model.rank = "full"`): complete tensors of the model are trained.

whole_tensors: which tensors are trained, and their values by the names of a checkpoint.
"""
