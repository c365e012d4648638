"""Prepare training data, from files on disk to padded batches, and count everything that is left out or truncated.

`read_records` makes records, `split` parts of them, `encode` sequences, and `Loader` batches.
"""

from __future__ import annotations

from lorakit.choices import Overlong
from lorakit.data.encoding import Encoded, Sequence, Sequences, encode, encode_record, lengths
from lorakit.data.loader import Batch, BatchLoader, Loader, by_length, order_by_length, padding_id
from lorakit.data.reading import python_reference, read_records, read_split, streamable_bytes, write_python_reference
from lorakit.data.records import Completion, Conversation, Document, Labeled, Message, Record, Records, Tagged
from lorakit.data.report import DataReport, Report
from lorakit.data.shapes import SHAPES, Request, text_records
from lorakit.data.sources import PARTIAL
from lorakit.data.splitting import STRATIFIED, Split, check_rule, few_rows, split
from lorakit.data.stored import AnyRecords, StoredRecords
from lorakit.data.streaming import StreamLoader, StreamSplit, read_stream
from lorakit.data.token_cache import TokenCache
from lorakit.data.tokens import Tokenizer

__all__ = [
    "PARTIAL",
    "SHAPES",
    "STRATIFIED",
    "AnyRecords",
    "Batch",
    "BatchLoader",
    "Completion",
    "Conversation",
    "DataReport",
    "Document",
    "Encoded",
    "Labeled",
    "Loader",
    "Message",
    "Overlong",
    "Record",
    "Records",
    "Report",
    "Request",
    "Sequence",
    "Sequences",
    "Split",
    "StoredRecords",
    "StreamLoader",
    "StreamSplit",
    "Tagged",
    "TokenCache",
    "Tokenizer",
    "by_length",
    "check_rule",
    "encode",
    "encode_record",
    "few_rows",
    "lengths",
    "order_by_length",
    "padding_id",
    "python_reference",
    "read_records",
    "read_split",
    "read_stream",
    "split",
    "streamable_bytes",
    "text_records",
    "write_python_reference",
]
