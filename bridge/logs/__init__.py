"""What is logged of a session, in which format, and where the lines go.

records.py adds facts to each of pyftpdlib's records and writes xferlog lines, output.py formats them (text or
JSON), writer.py takes lines to files and pipes on a thread of its own.

Nothing here makes a session wait: what a disk cannot take is dropped and counted. Begin with records.py.

Public names: Logs, RecordsMixin, XferlogMixin, coloured.
"""

from bridge.logs.output import Logs, coloured
from bridge.logs.records import RecordsMixin, XferlogMixin

__all__ = ["Logs", "RecordsMixin", "XferlogMixin", "coloured"]
