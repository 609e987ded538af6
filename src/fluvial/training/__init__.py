"""Training a model on data."""
