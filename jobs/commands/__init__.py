"""One file a subcommand; each holds one click command named `command`."""
