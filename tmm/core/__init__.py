"""Private: names, keys, metrics and records that everything speaks in, and private torch names."""
