"""Helpers of the operations that draw.

specs      parse a model with adapters: FILE+ADAPTER:STRENGTH
models     load such a model and draw with it
previews   draw during a training
pictures   read and write picture files and their captions
"""
