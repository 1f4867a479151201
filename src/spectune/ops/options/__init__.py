"""The options of every operation, one frozen record each.

Nothing here imports torch, so that interfaces show help texts and check values without loading it.

    values            types that several records use
    model_files       inspect, null, split, verify
    adapter_files     rebuild, export, slice, convert
    pictures          sample, compare
    training          train, plan, recipe import
"""
