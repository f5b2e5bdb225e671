"""Private: what several processes tell each other about a step."""
