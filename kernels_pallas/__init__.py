"""What attention computes: one folder a kind, each with one operation defined once and written for two accelerators."""
