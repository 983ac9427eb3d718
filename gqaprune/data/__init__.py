"""Turn text into token windows: corpora, windows, prompts, text sampled from a model.

May import placement and the packages below it, but no Lightning. To add a named corpus, add an entry to `HUB` in
`corpora.py`.
"""
