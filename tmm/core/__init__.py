"""What everything else speaks in: names, keys, metrics, records. Numbers and texts, no threads."""
