"""Show what a run measured: the report with its table, figures, and the page `report.html`.

May import planning and evaluation and what stands below them. To add a number to the table, add a row in `report.py`;
a chart belongs in `figures.py`, and its place on the page in `page.py`.
"""
