"""The study's report: one self-contained HTML file, made from records only."""

from fedmentor_core.report.html import build_report, write_report

__all__ = ["build_report", "write_report"]
