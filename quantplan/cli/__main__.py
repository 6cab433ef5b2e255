"""`python -m quantplan.cli`."""

from quantplan.cli import main

main()
