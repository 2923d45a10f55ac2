"""Plans for memory: which weights are kept small, and where. They move nothing themselves."""
