"""Training with optax: drafts for existing models, and small models from scratch."""
