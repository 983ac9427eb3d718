"""Load Hugging Face causal LMs, describe their architecture, and run and gate them layer by layer.

May import plan and common. To add a model family, describe it as data in `families.py`; only that file and
`architecture.py` use attribute names of models.
"""
