"""Private: what a user asks for, and what it means for a model."""
