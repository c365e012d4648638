"""Several processes on one run: start, connection, exchange, failures and shards."""
