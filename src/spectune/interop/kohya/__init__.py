"""Import commands and settings files of kohya's sd-scripts as recipes."""
