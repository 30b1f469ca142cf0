"""Preparation of a training run: write a recipe, check recipe and data, estimate memory and time."""
