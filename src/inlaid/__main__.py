"""`python -m inlaid` is `inlaid`."""

from inlaid.cli import main

main()
