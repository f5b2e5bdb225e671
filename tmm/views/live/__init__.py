"""Private: a run as it goes, while another process records it, and afterwards."""
