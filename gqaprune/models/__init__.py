"""Know how a Hugging Face causal LM is built, loaded, run layer by layer, and gated.

May import plan and common. To add a model family, describe it as data in `families.py`; it and `architecture.py` are
all that knows attribute names.
"""
