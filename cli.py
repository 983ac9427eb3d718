"""`python cli.py fit …` from a checkout, the same as `gqaprune fit …`."""

from gqaprune.cli import main

raise SystemExit(main())
