"""Files shipped with the package: the embedded vision transformer."""
