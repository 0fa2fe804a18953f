"""Jobs over many shards: config, plan, leases, commits, the command line. Imports no torch."""
