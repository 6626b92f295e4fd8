"""JSON records of the page, its pictures and its own files."""
