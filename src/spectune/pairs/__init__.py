"""Pair a base with adapters: check that they belong together, build the model, and split a model.

| module | contents |
| --- | --- |
| rules | the table of allowed pairs of base and adapter, and the checks that apply it |
| overlap | recognizing a principal by its values where metadata is missing |
| merged | base + adapters, and residual + principal, as lazy models |
| replaced | tensors of the base that a tuned adapter replaces completely |
| differences | differences of biases, norms and embeddings, added to tensors of the base |
| strength | the factors that multiply the change of an adapter, and the weights of a checkpoint in a sum |
| weighted | weighted sums of checkpoints as lazy models |
| trained_principal | the deltas from the original principal to one that another program trained |
| rank_plan | the rank of every layer, chosen by a rank, an energy or a file size |
| sizes | parse and format file sizes |
| spectrum_report | the singular spectra of a checkpoint |
| split_tensor | split one tensor |
| residual_file | the exceptions and original dtypes that a residual file stores |
| round_trip | compare residual + principal with the model that was split |
"""
