"""The link over a network: gRPC streams that carry the frames of :mod:`flexp.links.frames`."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC logs every stream that ends

from flexp.links.grpc.connecting import connect
from flexp.links.grpc.link import GrpcLink
from flexp.links.grpc.security import ServerTls
from flexp.links.grpc.serving import Serving, serve
from flexp.links.grpc.tokens import Tokens

__all__ = ["GrpcLink", "ServerTls", "Serving", "Tokens", "connect", "serve"]
