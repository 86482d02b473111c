"""`python -m isthmus`, which torchrun needs."""

from isthmus.cli.main import main

main()
