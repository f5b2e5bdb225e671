"""Private: statistics as operations that a compiler fuses into the kernels that exist already."""
