"""What was measured of a model and chosen for it, as data and as files."""
