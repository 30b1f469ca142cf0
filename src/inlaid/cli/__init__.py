"""The `inlaid` command."""
