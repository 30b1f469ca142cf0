"""Command-line interface of inlaid."""
