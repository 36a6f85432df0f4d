"""The data room: from files to every client's encoded examples."""

from flexp.data.federation import load_federation
from flexp.data.tasks import pad_id
from flexp.data.types import Batch, ClientData, Example, Federation, Forward, Task

__all__ = ["Batch", "ClientData", "Example", "Federation", "Forward", "Task", "load_federation", "pad_id"]
