"""Videos and scenes from a trained run."""
