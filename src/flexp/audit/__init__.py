"""What a server can read of its clients, by attacks that it could make."""

from flexp.audit.auditing import Audit, Reading, audit

__all__ = ["Audit", "Reading", "audit"]
