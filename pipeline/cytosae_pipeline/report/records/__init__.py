"""The report's data as JSON records."""
