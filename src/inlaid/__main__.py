"""Entry point of `python -m inlaid`."""

from inlaid.cli.main import main

main()
