"""Training: composing a model from parts, teaching it in stages, and measuring what it learned."""
