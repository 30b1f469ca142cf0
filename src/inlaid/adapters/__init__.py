"""Tuners and adapter files: attaching, training, reading, writing, merging and converting adapters."""
