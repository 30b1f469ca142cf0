"""Comparison of a fine-tuned model with its base model: metrics and report."""
