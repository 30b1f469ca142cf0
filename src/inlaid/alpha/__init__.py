"""Transparent videos: classes that add an alpha channel to a model family."""
