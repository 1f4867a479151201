"""Find, open and describe the picture files of a run.

formats: the file formats that are read. No other decoder of Pillow is ever started.
profiles: color profiles, converted to sRGB.
epoch: the counts of an epoch, as a table.
walk: the files and folders below a folder.
"""
