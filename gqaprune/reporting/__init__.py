"""Show the results of a run: the report with its table, figures, and the page `report.html`.

May import planning, evaluation and the packages below them. To add a number to the table, add a row in `report.py`;
add charts in `figures.py`. A section of the page is `describe_x` in `sections.py` and the macro `x` in
`templates/sections.html`; `page.py` puts the two together.
"""
