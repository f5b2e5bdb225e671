"""Planted faults, healthy trainings, and whether the diagnosis names the cause first."""
