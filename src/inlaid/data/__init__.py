"""Datasets: layouts, clips, windows, problems, order and the cache."""
