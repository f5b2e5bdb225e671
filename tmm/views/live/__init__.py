"""A run as it goes: what is shown of it while another process records it, and afterwards."""
