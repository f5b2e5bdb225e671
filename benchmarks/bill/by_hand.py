"""Calls that somebody placed in the forward of a GPT, behind each module.

As torchtitan's ``tensor_logging`` does, they write rows of a buffer inside of the graph. Each block
has a buffer of its own, so that equal blocks share a program. Written in plain torch the statistics
are compiled and run in every step. As an operator, which the compiler does not look into, they are
skipped where the tensor ``enabled`` holds 0, so that one program serves all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.bill.tasks import BreakingBlock, break_graph
from benchmarks.five import five, measured_modules, named
from tmm.examples.gpt import GPT, MLP, Attention, Block

Write = Callable[[Tensor, Tensor, int, Tensor], None]
"""Writes what is to be known of a tensor into the row of a buffer, if the last one is not 0."""


def write_always(x: Tensor, buffer: Tensor, row: int, enabled: Tensor) -> None:
    """Write the statistics in every step, in plain torch."""
    buffer[row] = five(x)


@torch.library.custom_op("tmm_benchmarks::write_when_enabled", mutates_args=("buffer",))
def write_when_enabled(x: Tensor, buffer: Tensor, row: int, enabled: Tensor) -> None:
    """Write the statistics where ``enabled`` is not 0."""
    if enabled.item():
        buffer[row] = five(x)


@write_when_enabled.register_fake
def _(x: Tensor, buffer: Tensor, row: int, enabled: Tensor) -> None:
    return None


class Notes:
    """Where the outputs of one block, or of what is around the blocks, are noted."""

    def __init__(self, names: list[str], enabled: Tensor, write: Write) -> None:
        self.names = names
        self.rows = {name: row for row, name in enumerate(names)}
        self.buffer = torch.zeros(len(names), 5, device=enabled.device)
        self.enabled = enabled
        self.write = write

    def __call__(self, name: str, output: Tensor) -> Tensor:
        """Note the output of the module of that name, and give it back."""
        self.write(output.detach(), self.buffer, self.rows[name], self.enabled)
        return output


class NotedAttention(Attention):
    """An attention whose modules' outputs are noted."""

    notes: Notes

    def forward(self, stream: Tensor) -> Tensor:
        """Mix the positions of ``stream``, each with those before it."""
        notes = self.notes
        projected = notes("attn.c_attn", self.c_attn(stream))
        heads = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind()
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = notes("attn.c_proj", self.c_proj(mixed.transpose(1, 2).flatten(2)))
        return notes("attn.resid_dropout", self.resid_dropout(mixed))


class NotedMLP(MLP):
    """An MLP whose modules' outputs are noted."""

    notes: Notes

    def forward(self, stream: Tensor) -> Tensor:
        """Transform each position of ``stream`` by itself."""
        notes = self.notes
        stream = notes("mlp.c_fc", self.c_fc(stream))
        stream = notes("mlp.gelu", self.gelu(stream))
        stream = notes("mlp.c_proj", self.c_proj(stream))
        return notes("mlp.dropout", self.dropout(stream))


class NotedBlock(Block):
    """A block whose modules' outputs are noted."""

    notes: Notes
    breaks: bool

    def forward(self, stream: Tensor) -> Tensor:
        """Add what both branches contribute to ``stream``."""
        notes = self.notes
        stream = stream + notes("attn", self.attn(notes("ln_1", self.ln_1(stream))))
        if self.breaks:
            break_graph()
        return notes("", stream + notes("mlp", self.mlp(notes("ln_2", self.ln_2(stream)))))


class NotedGPT(GPT):
    """A GPT whose modules' outputs are noted."""

    notes: Notes

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at each position."""
        notes = self.notes
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        stream = notes("wte", self.wte(tokens)) + notes("wpe", self.wpe(positions))
        stream = notes("drop", self.drop(stream))
        for block in self.h:
            stream = block(stream)
        stream = notes("ln_f", self.ln_f(stream))
        return notes("", notes("lm_head", self.lm_head(stream)))


NOTED = {Attention: NotedAttention, MLP: NotedMLP, Block: NotedBlock, BreakingBlock: NotedBlock}


def place_calls(model: GPT, write: Write) -> tuple[Tensor, Callable[[], Mapping[str, float]]]:
    """Make a GPT one whose outputs are noted.

    Gives the tensor that enables the notes, and what reads them, by name of the module.
    """
    enabled = torch.zeros((), device=model.lm_head.weight.device)
    blocks = {f"h.{index}": block for index, block in enumerate(model.h)}
    around = [name for name in measured_modules(model) if not name.startswith("h.")]
    noted = {"": Notes(around, enabled, write)}
    for prefix, block in blocks.items():
        noted[prefix] = notes = Notes(list(measured_modules(block)), enabled, write)
        for module in (block.attn, block.mlp, block):
            _become(module, NOTED[type(module)], notes, breaks=isinstance(module, BreakingBlock))
    _become(model, NotedGPT, noted[""])

    def read() -> Mapping[str, float]:
        names = [
            ".".join(filter(None, (prefix, name)))
            for prefix, notes in noted.items()
            for name in notes.names
        ]
        return named(names, torch.cat([notes.buffer for notes in noted.values()]))

    return enabled, read


def _become(
    module: nn.Module, kind: type[nn.Module], notes: Notes, *, breaks: bool = False
) -> None:
    module.__class__ = kind
    module.notes = notes  # type: ignore[assignment]
    module.breaks = breaks  # type: ignore[assignment]
