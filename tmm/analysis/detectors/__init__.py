"""Private: the built-in detectors: one theme per file, plain functions of a record."""
