"""What a report is computed from: statistics, groups of patients, notes, pseudonyms, limits."""
