"""A loaded base model with its tokenizer and adapters, as one object: `open_session` and `Session`."""

from __future__ import annotations

from lorakit.session.answers import AnswerMetrics
from lorakit.session.coding import EvalRows, RowsToPredict, to_predict
from lorakit.session.comparing import GENERAL_TEXT, Measured, compare
from lorakit.session.measuring import Evaluation
from lorakit.session.opening import open_session
from lorakit.session.prompts import Answer, Remark
from lorakit.session.session import Session
from lorakit.session.spec import SessionOptions, SessionSpec, session_spec

__all__ = [
    "GENERAL_TEXT",
    "Answer",
    "AnswerMetrics",
    "EvalRows",
    "Evaluation",
    "Measured",
    "Remark",
    "RowsToPredict",
    "Session",
    "SessionOptions",
    "SessionSpec",
    "compare",
    "open_session",
    "session_spec",
    "to_predict",
]
