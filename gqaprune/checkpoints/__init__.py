"""Save models, and say where they came from: every format from stock to GGUF, adapters merged, cards.

May import what stands below it: reporting, planning and evaluation, scoring, surgery, data and training, placement,
models, plan, common. To add a format, write the function that makes its files, in a file of its own, and enter it in
`FORMATS` of `formats.py`: all else asks its entry.
"""
