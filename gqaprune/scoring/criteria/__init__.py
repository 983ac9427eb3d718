"""Criteria by what they look at: gates, weight gradients, activations, weights alone."""
