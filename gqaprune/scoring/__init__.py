"""Score units, blocks and layers: criteria, outliers, sensitivity, measured damage.

May import surgery, data, training and the packages below them. To add a criterion, write a class in `criteria/` and add
it to `CRITERIA` in `scores.py`.
"""
