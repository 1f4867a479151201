"""The captions of images: read from files, checked, and varied between draws.

text: the text of a file, its encoding and its lines.
formats: captions in JSON, of sd-scripts and of downloaders.
sidecars: files with the captions of many images.
reading: the captions of the images in a folder.
findings: what may be a mistake, counted.
draws: the caption of one draw.
"""
