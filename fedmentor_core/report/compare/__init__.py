"""The report of a comparison: one self-contained HTML file, made from its records only."""

from fedmentor_core.report.compare.page import render_comparison

__all__ = ["render_comparison"]
