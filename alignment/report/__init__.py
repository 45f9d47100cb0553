"""The report of a run: one HTML file with plots, samples, calibration and results, which opens anywhere.

It is made of what lies in the run's folder, whatever the method was; what is not there is left out, and what cannot be
read is told on the page. Nothing in it comes from elsewhere: no scripts, no fonts, plots are SVG drawn here.
"""

from alignment.report.folder import read
from alignment.report.page import write

__all__ = ["read", "write"]
