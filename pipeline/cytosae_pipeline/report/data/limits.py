"""Limits of a report. Those that the page applies too reach it in the overview's record."""

SIGNIFICANT_Q = 0.05
"""A latent differs between groups if its q is below this."""

MAX_CORRELATED = 2000
"""Largest number of patients for which there is a matrix of all pairs."""

MAX_UPLOAD = 64 << 20
"""Bytes of an uploaded image."""
