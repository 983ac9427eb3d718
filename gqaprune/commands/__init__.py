"""Tools around pruning, each a function and a subcommand."""
