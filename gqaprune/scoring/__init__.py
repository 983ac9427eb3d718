"""Score units, blocks and layers: criteria, outliers, sensitivity, measured damage.

May import surgery, data, training and what stands below them. To add a criterion, write a class in `criteria/` and
enter it in `CRITERIA` of `scores.py`.
"""
