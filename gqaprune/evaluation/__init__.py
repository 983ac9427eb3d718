"""Measure and judge models: perplexity, generated text, side-by-side predictions, causes of broken models.

May import scoring and the packages below it.
"""
