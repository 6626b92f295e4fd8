"""The whole program on a drawn cohort whose groups are known."""
