"""Private: runs: started, kept, listed and exported."""
