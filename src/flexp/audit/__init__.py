"""What a server can read of its clients, by attacks that it could make."""

from flexp.audit.auditing import Audit, Reading, attacked, audit
from flexp.audit.watching import Known, Watch, Watched, check_watchable, unread, watchable, watching

__all__ = [
    "Audit",
    "Known",
    "Reading",
    "Watch",
    "Watched",
    "attacked",
    "audit",
    "check_watchable",
    "unread",
    "watchable",
    "watching",
]
