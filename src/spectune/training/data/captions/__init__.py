"""The captions of images: read from files, checked, and varied between draws.

text: the text of a file, its encoding and its lines.
formats: captions in JSON, of sd-scripts and of downloaders.
sidecars: files with the captions of many images.
reading: the captions of the images in a folder.
findings: possible mistakes, counted.
draws: make the caption of one draw.
"""
