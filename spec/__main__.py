"""`python -m spec`."""

from spec.cli import main

main()
