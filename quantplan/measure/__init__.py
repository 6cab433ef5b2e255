"""A model's own losses: what to measure, the runs, and what they say."""
