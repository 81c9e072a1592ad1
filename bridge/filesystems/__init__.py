"""Where files are, and how blocking work leaves the hub.

On a disk: local.py (errors are told), jail.py (nobody leaves the home), atomic.py (uploads appear when they
are whole). Elsewhere: virtual.py and streams.py. On native threads: offload.py, authorizers.py and
threads.py. splice.py moves bytes in the kernel, replace.py writes a small file whole, text.py shows names and
errors.

It never replies to a client: a file system raises, the session tells. Begin with local.py.

Public names: AtomicFS, ConfinedFS, Entry, HomeFS, OffloadedAuthorizer, OffloadedFS, Threads, VirtualFS,
remove_leftovers. (The rest is for other rooms.)
"""

from bridge.filesystems.atomic import AtomicFS, remove_leftovers
from bridge.filesystems.authorizers import OffloadedAuthorizer
from bridge.filesystems.jail import ConfinedFS
from bridge.filesystems.local import HomeFS
from bridge.filesystems.offload import OffloadedFile, OffloadedFS
from bridge.filesystems.splice import BURST, SENDING, UPSTREAMS, Splice, Unspliceable
from bridge.filesystems.streams import Entry
from bridge.filesystems.text import encodable, one_line, printable
from bridge.filesystems.threads import THREADS, Threads
from bridge.filesystems.virtual import VirtualFS

__all__ = [
    "BURST",
    "SENDING",
    "THREADS",
    "UPSTREAMS",
    "AtomicFS",
    "ConfinedFS",
    "Entry",
    "HomeFS",
    "OffloadedAuthorizer",
    "OffloadedFS",
    "OffloadedFile",
    "Splice",
    "Threads",
    "Unspliceable",
    "VirtualFS",
    "encodable",
    "one_line",
    "printable",
    "remove_leftovers",
]
