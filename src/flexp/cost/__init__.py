"""What a client costs, whoever asks: memory, operations, seconds and bytes, of a device that is measured or a class.

- :mod:`~flexp.cost.probe`, :mod:`~flexp.cost.echo`: the peak memory of a client, measured in a process of its own.
- :mod:`~flexp.cost.counting`: bytes that are alive and operations, of whatever runs. :mod:`~flexp.cost.flops` counts
  the real steps of a simulation with it, :mod:`~flexp.cost.model_cost` every piece of a model without its weights
  (:mod:`~flexp.cost.skeleton`).
- :mod:`~flexp.cost.device`, :mod:`~flexp.cost.measure`, :mod:`~flexp.cost.link`: what this machine has, the seconds of
  a model's pieces on it, and its network; kept as a :mod:`~flexp.cost.profile`.
- :mod:`~flexp.cost.predict`: what a step takes with a :mod:`~flexp.cost.choice`, before anything is trained;
  :mod:`~flexp.cost.memory` its bytes, :mod:`~flexp.cost.speed` its seconds.
- :mod:`~flexp.cost.clock`: what a run would have taken on its clients' devices.

A cost knows no method: it is given a stage, a :class:`~flexp.cost.probe.Probe` and a
:class:`~flexp.cost.clock.Schedule`.
"""
