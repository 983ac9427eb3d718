"""Recover by fine-tuning: losses, distillation, adapters, optimizers, accumulation, resumed runs.

May import placement and the packages below it. Only `accumulation.py`, `launch.py`, `stopping.py` and
`lightning_internals.py` use Lightning.
"""
