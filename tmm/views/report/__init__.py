"""Private: what runs recorded as one HTML page that needs nothing else."""

from tmm.views.report.page import report_page, write_report

__all__ = ["report_page", "write_report"]
