"""When a run saves, validates and draws previews, and the disk space of its saves.

intervals: what is due after a step: by steps, by epochs, or by the clock.
disk:      the sizes of the adapters and states of a run.
"""
