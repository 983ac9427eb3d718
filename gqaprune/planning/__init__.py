"""Decide how many units each block keeps and which: settings, budgets, allocations, checks, the plan.

May import scoring and what stands below it. To add an allocation, write a pure function on numbers in a file of
`allocation/` and enter it in `ALLOCATIONS`: all else asks its entry. A setting is a field of `config.py`.
"""
