"""The command line: one file a subcommand, each a thin face over the library."""
