"""Cut weights as a plan says, and repair what is left: least squares, then refinement, layer by layer.

May import placement and what stands below it. `cut.py` changes shapes, `repair.py` refits, `refinement.py` trains.
"""
