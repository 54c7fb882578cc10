"""`python -m backends`."""

from backends.cli import main

main()
