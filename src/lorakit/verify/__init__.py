"""Compare an adapter's answers in other runtimes with lorakit's: token ids, log-probabilities, greedy tokens."""

from __future__ import annotations

from lorakit.verify.report import Comparison, GreedyDifference, VerifyReport
from lorakit.verify.verifying import VerifyOptions, verify

__all__ = ["Comparison", "GreedyDifference", "VerifyOptions", "VerifyReport", "verify"]
