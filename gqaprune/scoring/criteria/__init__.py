"""Criteria, by what they read: gates, weight gradients, activations, or only weights."""
