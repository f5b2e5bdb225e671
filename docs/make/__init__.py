"""Makes the pages of the site that follow from the code, and the pictures, which are of runs."""
