"""Keep models larger than memory: decoder layers on disk or sharded over devices, one whole at a time.

Skip this wing unless the model is larger than memory. May import models, plan, common.
"""
