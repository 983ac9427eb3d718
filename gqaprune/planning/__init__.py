"""Decide how many units each block keeps, and which ones: settings, budgets, allocations, checks and the plan.

May import scoring and the packages below it. To add an allocation, write a pure function on numbers in `allocation/`
and add it to `ALLOCATIONS`; all other code reads its entry there. Settings are fields in `config.py`.
"""
