"""Save models in every format from stock to GGUF, with merged adapters and model cards; find their dense models.

May import the packages below it: reporting, planning and evaluation, scoring, surgery, data and training, placement,
models, plan, common. To add a format, write the function that makes its files, in a file of its own, and add an entry
to `FORMATS` in `formats.py`; all other code uses that entry.
"""
