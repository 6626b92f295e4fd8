"""What a report is made of: statistics, groups, notes, pseudonyms."""
