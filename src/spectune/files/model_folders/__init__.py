"""Models that are passed by name instead of by path.

config: the user's configuration file, which lists the folders of other programs.
search: the models in these folders, and the one that a name means.
hub: a model of the Hugging Face hub, which is downloaded only if it is written as hub:owner/name.

Nothing here imports torch.
"""
