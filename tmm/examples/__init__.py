"""A small GPT, real text and a training loop to try the monitoring on."""
