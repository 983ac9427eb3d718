"""Show what a run measured: the report with its table, figures, and the page `report.html`.

May import planning and evaluation and what stands below them. To add a number to the table, add a row in `report.py`;
a chart belongs in `figures.py`. A section of the page is `describe_x` in `sections.py` and the macro `x` in
`templates/sections.html`; `page.py` puts the two together.
"""
