"""Training with optax: drafts for a model that exists, and small models from nothing."""
