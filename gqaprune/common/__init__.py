"""Helpers that know nothing of language models: files, console, logs, devices, finished stages.

May import nothing of the package but itself.
"""
