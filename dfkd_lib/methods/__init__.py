"""One module per paper, and one per baseline, each named as the field names it."""
