"""What the operations that draw have in common.

specs      models with adapters as words: FILE+ADAPTER:STRENGTH
models     load such a model and draw with it
pictures   picture files and their captions
"""
