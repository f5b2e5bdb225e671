"""Private: how a user's own functions become part of a graph."""
