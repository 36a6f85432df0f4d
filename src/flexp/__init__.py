"""FlexP: flexible personalized split federated fine-tuning of transformers."""

from flexp._version import __version__

__all__ = ["__version__"]
