"""Tuners and adapter files: attach, train, read, write, merge, convert."""
