"""Helpers that do not depend on language models: files, console, logs, devices, finished stages.

May import nothing else of the package.
"""
