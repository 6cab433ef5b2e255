"""What was promised beside what the real runtime does, and what a profile learns of it."""
