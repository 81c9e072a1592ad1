"""Worker processes that share a port and its limits, and the parent that replaces them.

run.py is what the parent binds and what each worker does, supervisor.py the parent's loop, limits.py how the
server's limits count in all of them.

The parent never uses a hub: it forks. Begin with supervisor.py.

Public names: Link, Parent, SharedPort, listeners_of, run.
"""

from bridge.workers.limits import Retiring, SharedLimits, table
from bridge.workers.run import Link, SharedPort, listeners_of, run
from bridge.workers.supervisor import Parent

__all__ = ["Link", "Parent", "Retiring", "SharedLimits", "SharedPort", "listeners_of", "run", "table"]
