"""The classes of torch-module-monitor, over tmm: change one import, and compile the model."""

from tmm.module_monitor.further_measurements import (
    RefinedCoordinateCheck,
    l2_norm,
    monitor_scaled_dot_product_attention,
)
from tmm.module_monitor.hooks import HooksManager
from tmm.module_monitor.mixin import MonitorMixin
from tmm.module_monitor.module_monitor import ModuleMonitor
from tmm.module_monitor.names import default_format_module_name_fn
from tmm.module_monitor.storage import StorageManager

__all__ = [
    "HooksManager",
    "ModuleMonitor",
    "MonitorMixin",
    "RefinedCoordinateCheck",
    "StorageManager",
    "default_format_module_name_fn",
    "l2_norm",
    "monitor_scaled_dot_product_attention",
]
