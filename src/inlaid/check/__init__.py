"""Commands before training: write a recipe, check data and recipe, estimate memory and time."""
