"""Private: what runs on every monitored step: names, collection, eager reductions and the store."""
