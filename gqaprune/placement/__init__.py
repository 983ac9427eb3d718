"""Work on models larger than memory: decoder layers on disk or sharded over devices, with one whole at a time.

Skip this package unless the model is larger than memory. May import models, plan, common.
"""
