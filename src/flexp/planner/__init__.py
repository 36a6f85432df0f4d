"""According to its resources: which cut follows from what a device has and what a model costs it.

Begin with :mod:`~flexp.planner.plan`. The exact optimum (:mod:`~flexp.planner.solve`) and the front
(:mod:`~flexp.planner.pareto`) can be left unread. :mod:`~flexp.planner.policy` decides again while clients train.
"""
