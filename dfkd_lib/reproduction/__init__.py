"""The book's machinery: the command, chapters at work, parameters, plans and batches, records read as tables and
verdicts, pages and the site.

Imports everything else; nothing else imports it. It alone needs matplotlib, pandas and, for running notebooks, Jupyter.
"""
