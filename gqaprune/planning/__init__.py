"""Decide how many units each block keeps and which: settings, budgets, allocations, the plan.

May import scoring and what stands below it. To add an allocation, write a pure function on numbers in `allocation/` and
enter it in `ALLOCATIONS`; a setting is a field of `config.py`.
"""
