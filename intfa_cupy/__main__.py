"""``python -m intfa_cupy``: the command line."""

from .cli import app

app(prog_name="intfa-cupy")
