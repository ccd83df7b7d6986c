"""Conversion of any model: convert, revert, report and verify."""

from fastcnn.convert.api import convert, revert
from fastcnn.convert.report import report
from fastcnn.convert.verify.verify import verify

__all__ = ["convert", "report", "revert", "verify"]
