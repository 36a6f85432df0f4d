"""Methods side by side: the same clients, batches and budget, tuned alike, over several seeds.

:mod:`config` says what is compared, :mod:`grid` what is tuned, :mod:`cells` and :mod:`workers` do the work,
:mod:`collect` gathers it in ``comparison.json``. Nothing heavy is imported here.
"""
