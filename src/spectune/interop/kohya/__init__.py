"""Recipes from the commands and settings of kohya's sd-scripts."""
