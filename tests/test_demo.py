from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tmm
from tmm.cli.demo_training import StepReport, TrainingSettings, demo_spec, train
from tmm.cli.training_progress import TrainingProgress
from tmm.examples.gpt import GPT, GPTConfig, next_token_loss
from tmm.examples.text import VOCABULARY, batches, decode, documentation_text, encode, split

TINY = GPTConfig(VOCABULARY, context=16, layers=2, heads=2, width=16, dropout=0.1)


def test_a_position_sees_those_before_it_only() -> None:
    model = GPT(TINY).eval()
    tokens = torch.randint(VOCABULARY, (2, 16))
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % VOCABULARY
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 16, VOCABULARY)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert (before[:, 10:] != after[:, 10:]).any(-1).all()


def test_an_untrained_model_knows_nothing() -> None:
    tokens = torch.randint(VOCABULARY, (4, 17))
    loss = next_token_loss(GPT(TINY)(tokens[:, :-1]), tokens[:, 1:])
    assert loss.item() == pytest.approx(torch.tensor(VOCABULARY).log().item(), rel=0.02)


@pytest.mark.parametrize("tie_weights", [False, True])
def test_tied_weights_are_one_parameter(tie_weights: bool) -> None:
    model = GPT(GPTConfig(tie_weights=tie_weights))
    assert (model.lm_head.weight is model.wte.weight) == tie_weights


def test_modules_have_the_usual_names() -> None:
    names = {name for name, _ in GPT(TINY).named_modules()}
    block = {"ln_1", "attn", "attn.c_attn", "attn.c_proj", "ln_2", "mlp", "mlp.c_fc", "mlp.c_proj"}
    assert {"wte", "wpe", "ln_f", "lm_head", *(f"h.1.{name}" for name in block)} <= names


def test_bias_can_be_left_out() -> None:
    assert not any(
        name.endswith("bias") for name, _ in GPT(GPTConfig(bias=False)).named_parameters()
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"heads": 3}, "multiple of heads"), ({"layers": 0}, "layers=0"), ({"dropout": 1}, "dropout")],
)
def test_wrong_sizes_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**wrong)  # type: ignore[arg-type]


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="context=16"):
        GPT(TINY)(torch.zeros(1, 17, dtype=torch.int64))


def test_the_text_is_real() -> None:
    text = documentation_text()
    assert len(text) > 100_000
    assert 'The "if" statement' in text


def test_a_python_without_the_text_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match="without the module pydoc_data.topics"):
        documentation_text()


def test_tokens_are_bytes() -> None:
    tokens = encode("naïve")
    assert tokens.tolist() == [110, 97, 195, 175, 118, 101]
    assert decode(tokens) == "naïve"


def test_the_end_of_the_text_is_held_back() -> None:
    corpus = split(torch.arange(20))
    assert corpus.training.tolist() == list(range(18))
    assert corpus.validation.tolist() == [18, 19]
    with pytest.raises(ValueError, match="validation_fraction"):
        split(torch.arange(20), 1.0)


def test_batches_are_passages_with_what_follows() -> None:
    def first(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        stream = batches(torch.arange(30), batch_size=4, length=5, generator=generator)
        return list(islice(stream, 3))

    for inputs, targets in first(0):
        assert inputs.shape == (4, 5)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(5))
    assert torch.equal(first(0)[2][0], first(0)[2][0])
    assert not torch.equal(first(0)[2][0], first(1)[2][0])


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        next(batches(torch.arange(5), batch_size=1, length=5, generator=torch.Generator()))


def test_training_reports_each_step_and_records_the_monitored(tmp_path: Path) -> None:
    reports: list[StepReport] = []
    settings = TrainingSettings(
        tmp_path / "run", steps=12, every=4, backend="eager", learning_rate=1e-2, model=TINY
    )
    validation_loss = train(settings, reports.append)
    assert [report.step for report in reports] == list(range(12))
    assert [report.step for report in reports if report.monitored] == [0, 4, 8]
    assert reports[-1].loss < reports[0].loss - 0.5
    assert validation_loss < reports[0].loss - 0.5
    with tmm.open_run(settings.run) as run:
        steps, losses = run.series("loss")
        norms = run.keys(r"activation/.*/l2$")
    assert steps.tolist() == [0, 4, 8]
    assert losses.tolist() == [report.loss for report in reports if report.monitored]
    assert norms == [f"activation/h.{i}.{part}/l2" for i in range(2) for part in ("attn", "mlp")]


def test_the_demo_measures_no_dropout() -> None:
    assert demo_spec(1).excludes("h.0.attn.resid_dropout")
    assert demo_spec(1).excludes("drop")
    assert not demo_spec(1).excludes("h.0.attn")


def test_the_cost_is_that_of_the_steps_that_compile_nothing(tmp_path: Path) -> None:
    progress = TrainingProgress(Console(quiet=True), TrainingSettings(tmp_path, steps=6, every=2))
    for step, seconds in enumerate((9.0, 8.0, 0.3, 0.2, 0.5, 0.2)):
        assert step > 3 or progress.cost(7) == ""
        progress.report(StepReport(step, 1.0, seconds, monitored=step % 2 == 0))
    told = progress.cost(7)
    assert "measures 7 numbers and takes 400 ms, another 200 ms: 2.00 times" in told
    assert "medians of 2 and 2 steps" in told
    assert "--every 6`" in told
