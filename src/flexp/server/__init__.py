"""The server's side: the shared blocks, trained by every client's gradient as it arrives."""

from flexp.server.server import Server

__all__ = ["Server"]
