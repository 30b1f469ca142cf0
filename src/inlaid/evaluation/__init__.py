"""Comparison of base and fine-tuned model: metrics and report."""
