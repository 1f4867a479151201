"""The options of every operation, one frozen record each.

Nothing here imports torch: interfaces can show help texts and check values without loading it.

    values            types and help texts that several records use
    model_files       inspect, merge, null, split, verify
    adapter_files     rebuild, export, slice, convert
    pictures          sample, compare
    dataset           dataset, dataset index
    training          new, train, plan, recipe import, demo, doctor
"""
