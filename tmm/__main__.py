"""``python -m tmm`` is the command ``tmm``."""

from tmm.cli import app

app(prog_name="tmm")
