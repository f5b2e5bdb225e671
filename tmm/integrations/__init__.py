"""tmm inside the frameworks that people train with: one callback for each.

``tmm.integrations.transformers``, ``lightning`` and ``torchtnt`` each have a ``TMMCallback``, and
``torchtitan`` a ``TMMMetricsProcessor``; a framework is imported with the module of its name only.
"""
