"""Plans, and what takes several of them to tell: frontiers and prices."""
