"""A plan as a page: one self-contained HTML file, and the same page live on this machine."""
