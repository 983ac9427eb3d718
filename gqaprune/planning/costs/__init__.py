"""Costs of each stage by arithmetic: floating-point operations and bytes moved, from shapes alone.

`base` has what all of them are sums of: products of matrices, and a model's forward and backward passes. Each stage is
a function of its own in `scoring`, `curves`, `repair` or `training`; `stages` puts those of a run in their order.
"""
