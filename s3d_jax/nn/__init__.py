"""The transformer: one forward pass for prefill, AR, draft, verify and training."""
