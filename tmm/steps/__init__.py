"""Private: training steps: what is open, what is measured when, and the user's face of both."""
