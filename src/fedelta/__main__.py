"""`python -m fedelta` runs the command line."""

from fedelta.cli.app import main

main()
