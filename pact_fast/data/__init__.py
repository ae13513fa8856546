"""Records with expert traces, and conversations as tokens that carry their role from construction."""

from pact_fast.data.chat import ChatFormat, Component, Tokens
from pact_fast.data.parsing import AssistantTurn, ToolCall
from pact_fast.data.records import LoadedRecords, Record, RecordError, load_records, write_records

__all__ = [
    "AssistantTurn",
    "ChatFormat",
    "Component",
    "LoadedRecords",
    "Record",
    "RecordError",
    "Tokens",
    "ToolCall",
    "load_records",
    "write_records",
]
