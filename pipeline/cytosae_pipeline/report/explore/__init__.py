"""The report served live on this machine."""
