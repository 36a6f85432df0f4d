"""What a server can read of its clients, by attacks that it could make."""

from flexp.audit.auditing import Audit, Reading, attacked, audit
from flexp.audit.watching import Watch, unread, watchable

__all__ = ["Audit", "Reading", "Watch", "attacked", "audit", "unread", "watchable"]
