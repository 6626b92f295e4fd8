"""Autoencoders and statistics in other programs' formats."""
