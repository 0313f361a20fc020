"""Shows what the log says: report.html (`python -m fdfo.report`), the console's lines, and sheets of images.

It formats numbers and draws curves. It computes no statistics of its own.
"""
