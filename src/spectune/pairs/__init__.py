"""Base and adapter together: which belong together, the model that they make, and splitting a model in two.

| module | contents |
| --- | --- |
| rules | the table of which adapter goes with which base, and the checks that follow it |
| overlap | recognizing a principal by its values where metadata is missing |
| merged | base + adapters, and residual + principal, as lazy models |
| replaced | tensors of the base that a tuned adapter replaces whole |
| strength | factors on the change of an adapter, by part |
| trained_principal | the deltas between a principal trained elsewhere and the original one |
| rank_plan | the rank of every layer by a rank, an energy or a file size |
| sizes | file sizes as text |
| spectrum_report | the singular spectra of a checkpoint |
| split_tensor | splitting one tensor |
| residual_file | exceptions and original dtypes in the file of a residual |
| round_trip | comparing residual + principal with the model that was split |
"""
