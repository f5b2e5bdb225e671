"""Runs: started, kept, listed and exported."""
