"""Stage one: images to an activation store, and comparing a store with its images again."""
