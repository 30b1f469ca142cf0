"""Datasets: layouts, clips, windows, problems, batch order and the cache."""
