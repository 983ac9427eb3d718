"""Compute the cost of each stage from shapes alone: floating-point operations and bytes moved.

`base` has the terms that all costs are sums of: matrix products, and forward and backward passes of a model. Each stage
has a function in `scoring`, `curves`, `repair` or `training`; `stages` lists those of a run in order.
"""
