"""The report of a comparison, from the contents of ``comparison.json``: its files (:mod:`write`) are one HTML page, and
tables in Markdown, LaTeX and CSV; :mod:`tables` has the one for the terminal as well.
"""
