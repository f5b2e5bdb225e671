"""Modules that log values of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tmm.instrumentation.show import is_shown, is_traced

if TYPE_CHECKING:
    from tmm.module_monitor.module_monitor import ModuleMonitor


class MonitorMixin:
    """A further base class of modules that log values of their own in ``forward``.

    ``ModuleMonitor.set_module`` lets them know the monitor. In ``forward``, ask
    ``self.is_monitoring``, and log with ``self.get_module_monitor()``: in compiled programs that
    costs nothing on steps that are not monitored, and makes no graph break on the others.

    ``is_reference_module`` tells whether the module is a part of the reference.
    """

    module_monitor: ModuleMonitor | None = None
    is_reference_module: bool = False

    def set_module_monitor(
        self, monitor: ModuleMonitor | None = None, is_reference_module: bool = False
    ) -> None:
        """Let the module know its monitor; called by ``set_module``."""
        self.module_monitor = monitor
        self.is_reference_module = is_reference_module

    def get_module_monitor(self) -> ModuleMonitor | None:
        """The monitor, if there is one."""
        return self.module_monitor

    @property
    def is_monitoring(self) -> bool:
        """Whether values that are logged now are recorded."""
        if is_traced():
            return is_shown() and self.module_monitor is not None
        return self.module_monitor is not None and self.module_monitor.is_monitoring()
