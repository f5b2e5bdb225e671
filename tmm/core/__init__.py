"""What everything else speaks in: names, keys, metrics, records. And what all need of torch."""
