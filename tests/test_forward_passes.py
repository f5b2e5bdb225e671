"""Forward passes of evaluations are kept apart from the steps that they run in."""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tmm
from tmm.core.failures import MonitoringWarning
from tmm.steps.forward_passes import EVALUATIONS, ForwardPasses

X, VALIDATION = torch.ones(4, 3), 50 * torch.ones(4, 3)
SPEC = tmm.Spec(tmm.activation("rms"))
KEY = "activation/encoder/rms"
HEAD = "activation/head/rms"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.norm(self.encoder(x)))
        return output


def rms(tensor: torch.Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()


def training(net: Net, *inputs: torch.Tensor) -> float:
    """What the rows of the encoder should be, from passes of these inputs."""
    return rms(torch.cat([net.encoder(x) for x in inputs or (X,)]))


@contextmanager
def evaluation(net: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    net.eval()
    with torch.set_grad_enabled(gradients):
        yield
    net.train()


def compiled(net: nn.Module, how: str) -> nn.Module:
    torch._dynamo.reset()
    if how == "whole":
        return torch.compile(net, backend="aot_eager")  # type: ignore[return-value]
    if how == "parts":
        for part in net.children():
            part.compile(backend="aot_eager")
    return net


def instrumented(how: str = "whole", spec: tmm.Spec = SPEC) -> tuple[Net, nn.Module, tmm.Monitor]:
    torch.manual_seed(0)
    net = Net()
    model = tmm.instrument(compiled(net, how), spec)
    return net, model, tmm.monitor(model)


WAYS = pytest.mark.parametrize("how", ["none", "whole", "parts"])


@WAYS
def test_a_validation_between_steps_of_a_run_is_kept_apart(tmp_path: Path, how: str) -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with tmm.start_run("p", root=tmp_path) as run:
        spec = tmm.Spec(tmm.activation("rms"), tmm.gradient("norm"), every=3)
        model = run.watch(compiled(net, how), spec, optimizer=optimizer)
        for step in range(7):
            model(X).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log({"loss": 1.0})
            run.step()
            if (step + 1) % 3 == 0:
                with evaluation(net):
                    model(VALIDATION)
                run.log({"val": 2.0})
        explained = tmm.explain(model).unmeasured
    with tmm.open_run(run.path) as recorded:
        assert recorded.series(KEY)[0].tolist() == [0, 3, 6]
        assert recorded.series(KEY)[1] == pytest.approx([training(net)] * 3)
        assert recorded.series("val")[0].tolist() == [3, 6]  # in the step that was open
        assert recorded.series("gradient/head.bias/norm")[0].tolist() == [0, 3, 6]
        assert EVALUATIONS in recorded.text("explain.txt")
    assert explained[EVALUATIONS].startswith("2 ")


def test_a_validation_before_the_first_training_step_is_kept_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    with tmm.start_run("p", root=tmp_path) as run:
        model = run.watch(net, SPEC)
        for _ in range(2):
            with evaluation(net):
                model(VALIDATION)
            model(X).sum().backward()
            run.step()
    with tmm.open_run(run.path) as recorded:
        assert recorded.series(KEY)[1] == pytest.approx([training(net)] * 2)


@pytest.mark.parametrize(("gradients", "logs"), [(False, True), (True, False)])
def test_an_evaluation_after_the_last_step_makes_no_step(
    tmp_path: Path, gradients: bool, logs: bool
) -> None:
    net = Net()
    with warnings.catch_warnings(), tmm.start_run("p", root=tmp_path) as run:
        warnings.simplefilter("error", MonitoringWarning)
        model = run.watch(net, SPEC)
        for _ in range(2):
            model(X).sum().backward()
            run.step()
        with evaluation(net, gradients=gradients):
            model(VALIDATION)
        if logs:
            run.log({"test": 1.0})
    with tmm.open_run(run.path) as recorded:
        assert recorded.series(KEY)[0].tolist() == [0, 1]
        assert recorded.steps.tolist() == ([0, 1, 2] if logs else [0, 1])


def test_a_forgotten_no_grad_and_eval_after_the_last_step_makes_no_step(tmp_path: Path) -> None:
    net = Net()
    with (
        pytest.warns(MonitoringWarning, match="after the last run.step.*not recorded"),
        tmm.start_run("p", root=tmp_path) as run,
    ):
        model = run.watch(net, SPEC)
        model(X).sum().backward()
        run.step()
        model(VALIDATION)
    with tmm.open_run(run.path) as recorded:
        assert recorded.steps.tolist() == [0]


def test_a_step_whose_loss_was_skipped_is_recorded(tmp_path: Path) -> None:
    net = Net()
    with tmm.start_run("p", root=tmp_path) as run:
        model = run.watch(net, SPEC)
        for step in range(3):
            loss = model(X * torch.nan if step == 1 else X).sum()
            if loss.isfinite():
                loss.backward()
            run.step()
    with tmm.open_run(run.path) as recorded:
        assert recorded.series(KEY)[0].tolist() == [0, 1, 2]
        assert recorded.series(KEY)[1][1] != recorded.series(KEY)[1][1]


def test_a_step_that_an_exception_ends_is_recorded(tmp_path: Path) -> None:
    net = Net()
    with pytest.raises(FloatingPointError), tmm.start_run("p", root=tmp_path) as run:
        model = run.watch(net, SPEC)
        for step in range(3):
            loss = model(X * torch.nan if step == 2 else X).sum()
            if loss.isnan():
                raise FloatingPointError
            loss.backward()
            run.step()
    with tmm.open_run(run.path) as recorded:
        assert recorded.series(KEY)[0].tolist() == [0, 1, 2]


def test_inference_alone_is_recorded(tmp_path: Path) -> None:
    net = Net().eval()
    with tmm.start_run("p", root=tmp_path) as run, torch.inference_mode():
        model = run.watch(net, SPEC)
        for _ in range(3):
            model(X)
            run.step()
    with tmm.open_run(run.path) as recorded:
        assert recorded.series(KEY)[1] == pytest.approx([training(net)] * 3)


def test_an_explicit_step_of_an_evaluation_is_recorded() -> None:
    net, model, monitor = instrumented()
    with monitor.step(0):
        model(X).sum().backward()
    with monitor.step(1), evaluation(net):
        model(VALIDATION)
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net, VALIDATION))
    assert EVALUATIONS not in tmm.explain(model).unmeasured


@pytest.mark.parametrize(
    ("how", "position", "gradients"),
    [
        ("none", "before", True),
        ("none", "between", False),
        ("whole", "between", True),
        ("whole", "after", False),
        ("parts", "before", False),
        ("parts", "after", True),
    ],
)
def test_an_evaluation_in_an_explicit_step_is_kept_apart(
    how: str, position: str, gradients: bool
) -> None:
    net, model, monitor = instrumented(how)
    with monitor.step(0):
        for place, x in (("before", X), ("between", 2 * X), ("after", None)):
            if place == position:
                with evaluation(net, gradients=gradients):
                    model(VALIDATION)
            if x is not None:  # of two micro-batches
                model(x).sum().backward()
                monitor.after_micro_batch()
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net, X, 2 * X))


def test_a_pass_in_training_mode_without_a_backward_pass_is_kept_apart() -> None:
    net, model, monitor = instrumented()
    with monitor.step(0):
        model(VALIDATION)
        model(X).sum().backward()
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


def test_backward_may_come_after_the_step() -> None:
    net, model, monitor = instrumented()
    for step in range(3):
        with monitor.step(step):
            loss = model(X).sum()
            with evaluation(net):
                model(VALIDATION)
        loss.backward()
        assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


def test_backward_may_come_after_the_step_of_a_run(tmp_path: Path) -> None:
    net = Net()
    with tmm.start_run("p", root=tmp_path) as run:
        model = run.watch(net, SPEC)
        for _ in range(3):
            loss = model(X).sum()
            run.step()
            loss.backward()
    with tmm.open_run(run.path) as recorded:
        assert recorded.series(KEY)[1] == pytest.approx([training(net)] * 3)


def test_two_losses_share_a_backward_pass() -> None:
    net, model, monitor = instrumented()
    other = 2 * X
    with monitor.step(0):
        loss = model(X).sum()
        with evaluation(net):
            model(VALIDATION)
        (loss + model(other).square().sum()).backward()
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net, X, other))


def test_a_frozen_model_in_evaluation_mode_is_finetuned() -> None:
    net, model, monitor = instrumented()
    net.encoder.requires_grad_(False)
    net.eval()
    with monitor.step(0):
        with torch.no_grad():
            model(VALIDATION)
        model(X).sum().backward()
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


def test_a_teacher_that_is_the_model_itself_is_kept_apart() -> None:
    net, model, monitor = instrumented()
    with monitor.step(0):
        with torch.no_grad():
            target = model(VALIDATION)
        (model(X) - target).square().sum().backward()
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


def test_the_gradient_of_an_input_is_no_training() -> None:
    """As for an adversarial example, or for forces in a validation."""
    net, model, monitor = instrumented()
    with monitor.step(0):
        x = VALIDATION.clone().requires_grad_()
        torch.autograd.grad(model(x).sum(), x)
        model(X).sum().backward()
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


def test_gradients_may_be_asked_for_by_name() -> None:
    net, model, monitor = instrumented("none")
    with monitor.step(0):
        model(VALIDATION)
        torch.autograd.grad(model(X).sum(), list(net.parameters()))
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


def test_an_output_may_be_changed_in_place_and_seen_in_part() -> None:
    net, model, monitor = instrumented()
    with monitor.step(0):
        model(VALIDATION)
        output = model(X)
        output.mul_(2)
        output[0].add_(1)
        output.t()[1].sum().backward()
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


def test_a_second_backward_pass_goes_through_it() -> None:
    net, model, monitor = instrumented("none")
    with monitor.step(0):
        model(VALIDATION)
        loss = model(X).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


@pytest.mark.parametrize(
    ("how", "reentrant"), [("none", True), ("whole", True), ("whole", False), ("parts", False)]
)
def test_a_checkpointed_call_of_the_model_counts_once(how: str, reentrant: bool) -> None:
    net, model, monitor = instrumented(how)
    plain, expected = Net(), training(net)
    plain.load_state_dict(net.state_dict())
    x = X.clone().requires_grad_()
    with monitor.step(0):
        loss = checkpoint(model, x, use_reentrant=reentrant).sum()
        with evaluation(net):
            model(VALIDATION)
        loss.backward()
    assert monitor.get_step_metrics()[KEY] == pytest.approx(expected)
    checkpoint(plain, X.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    for own, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)  # type: ignore[arg-type]


def test_parts_may_be_called_past_the_model() -> None:
    net, _, monitor = instrumented("parts")
    with monitor.step(0):
        with evaluation(net):
            net.head(net.norm(net.encoder(VALIDATION)))
        net.head(net.norm(net.encoder(X))).sum().backward()
        with evaluation(net):
            net.head(net.norm(net.encoder(VALIDATION)))
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


def test_a_frozen_encoder_without_gradients_belongs_to_the_training() -> None:
    net, _, monitor = instrumented("parts")
    with monitor.step(0):
        for x in (X, 2 * X):  # micro-batches
            with torch.no_grad():
                features = net.encoder(x)
            net.head(features).sum().backward()
        with evaluation(net):
            net.head(net.encoder(VALIDATION))
    metrics = monitor.get_step_metrics()
    assert metrics[KEY] == pytest.approx(training(net, X, 2 * X))
    assert metrics[HEAD] == pytest.approx(rms(net.head(net.encoder(torch.cat([X, 2 * X])))))


def test_training_without_gradients_is_recorded() -> None:
    """As by evolution strategies."""
    net, model, monitor = instrumented()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", MonitoringWarning)
        for step in range(2):
            with monitor.step(step):
                model(X)
                model(2 * X)
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net, X, 2 * X))


def test_what_cannot_be_known_is_warned_of() -> None:
    net, model, monitor = instrumented()
    with (
        pytest.warns(MonitoringWarning, match="cannot be known.*no_monitor") as warned,
        torch.no_grad(),
    ):
        for step in range(2):
            with monitor.step(step):
                model(X)
                with evaluation(net):
                    model(VALIDATION)
    assert len(warned) == 1
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


class Hidden(Net):
    """Its output is neither a tensor nor something that holds any."""

    def forward(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:  # type: ignore[override]
        output = super().forward(x)
        return lambda: output


def test_an_output_that_nobody_can_see_counts_and_is_warned_of() -> None:
    net = Hidden()
    model = tmm.instrument(compiled(net, "parts"), SPEC)
    monitor = tmm.monitor(model)
    with pytest.warns(MonitoringWarning, match="no tensor that tmm could find"), monitor.step(0):
        net.encoder(VALIDATION)
        model(X)().sum().backward()
        net.head(X).sum().backward()
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


class Policy(Net):
    def forward(self, x: torch.Tensor) -> torch.distributions.Categorical:  # type: ignore[override]
        return torch.distributions.Categorical(logits=super().forward(x))


def test_tensors_are_found_in_objects() -> None:
    net = Policy()
    model = tmm.instrument(net, SPEC)
    monitor = tmm.monitor(model)
    with monitor.step(0):
        with torch.no_grad():
            actions = model(VALIDATION).sample()
        model(X).log_prob(actions).sum().backward()
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


@pytest.mark.parametrize("how", ["fullgraph", "broken", "eager"])
def test_a_step_function_may_hold_an_evaluation(how: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Net()

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = net(VALIDATION)
        if how == "broken":
            torch._dynamo.graph_break()
        return (net(x) - target).square().sum()

    function, parts = step, [net]
    if how == "eager":
        measured = tmm.instrument(function, SPEC, module=net, parts=parts)
    else:
        function = torch.compile(step, backend="aot_eager", fullgraph=how == "fullgraph")
        measured = tmm.instrument(function, SPEC, module=net)
    monitor = tmm.monitor(measured)
    for number in range(2):
        with monitor.step(number):
            measured(X).backward()
            with evaluation(net):
                net(VALIDATION)
        assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))
    assert any("gradients" in reason for reason in tmm.explain(measured).unmeasured.values())


@pytest.mark.parametrize("how", ["compiled", "eager"])
def test_a_step_function_may_train_by_itself(how: str) -> None:
    torch._dynamo.reset()
    net = Net()

    def step(x: torch.Tensor) -> float:
        loss = net(x).sum()
        loss.backward()
        with evaluation(net):
            net(VALIDATION)
        return loss.item()

    if how == "compiled":
        function = torch.compile(step, backend="aot_eager")
        measured = tmm.instrument(function, SPEC, module=net)
    else:
        measured = tmm.instrument(step, SPEC, module=net, parts=[net])
    monitor = tmm.monitor(measured)
    with monitor.step(0):
        measured(X)
        with torch.no_grad():
            net(VALIDATION)
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


def test_an_encoder_may_run_before_a_step_function() -> None:
    net = Net()
    measured = tmm.instrument(
        lambda features: net.head(features).sum(),
        SPEC,
        module=net,
        parts=[net.encoder, net.head],
    )
    monitor = tmm.monitor(measured)
    with monitor.step(0):
        for x in (X, 2 * X):  # micro-batches
            with torch.no_grad():
                features = net.encoder(x)
            measured(features).backward()
        with evaluation(net):
            measured(net.encoder(VALIDATION))
    metrics = monitor.get_step_metrics()
    assert metrics[KEY] == pytest.approx(training(net, X, 2 * X))
    assert metrics[HEAD] == pytest.approx(rms(net.head(net.encoder(torch.cat([X, 2 * X])))))


def test_a_teacher_of_its_own_in_a_step_function_is_measured() -> None:
    net = Net()
    net.teacher = nn.Linear(3, 2)

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = net.teacher(x)
        return (net.head(net.encoder(x)) - target).square().sum()

    parts = [net.encoder, net.head, net.teacher]
    monitor = tmm.monitor(measured := tmm.instrument(step, SPEC, module=net, parts=parts))
    with monitor.step(0):
        measured(X).backward()
    assert monitor.get_step_metrics()["activation/teacher/rms"] == pytest.approx(
        rms(net.teacher(X))
    )


def test_everything_of_an_evaluation_is_kept_apart() -> None:
    class Recording(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tmm.record("mean", x)
            return super().forward(x)

    torch._dynamo.reset()
    net = Recording()
    spec = tmm.Spec(
        tmm.activation("rms"),
        tmm.activation_gradient("norm"),
        tmm.activation_difference("norm"),
        tmm.rcc(),
        reference="init",
    )
    model = tmm.instrument(torch.compile(net, backend="aot_eager"), spec)
    monitor = tmm.monitor(model)

    def measured(*, validates: bool) -> dict[str, object]:
        with monitor.step(0):
            if validates:
                with torch.no_grad():
                    model(VALIDATION)
                x = VALIDATION.clone().requires_grad_()
                torch.autograd.grad(model(x).sum(), x)
            model(X).sum().backward()
        return monitor.get_step_metrics()

    alone = measured(validates=False)
    assert {key.partition("/")[0] for key in alone} >= {"activation_gradient", "RCC x_t", "mean"}
    assert measured(validates=True) == alone


def test_an_evaluation_that_cannot_count_runs_the_plain_program() -> None:
    net, model, monitor = instrumented()
    with monitor.step(0):
        model(X).sum().backward()
        known = len(tmm.explain(model).graphs)
        with evaluation(net):
            expected = model(VALIDATION)
        assert len(tmm.explain(model).graphs) == known
    with evaluation(net):
        assert torch.equal(model(VALIDATION), expected)


def test_nothing_of_a_step_is_held_on_to() -> None:
    net, model, monitor = instrumented()
    with monitor.step(0):
        output = model(X)
        node = weakref.ref(output.grad_fn)
        output.sum().backward()
        del output
        gc.collect()
        assert node() is None
    with pytest.raises(KeyError), monitor.step(1):
        model(VALIDATION)
        raise KeyError
    with monitor.step(2):
        model(X)
    assert monitor.get_step_metrics()[KEY] == pytest.approx(training(net))


def test_many_evaluations_take_no_time_to_tell_apart() -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(40))
    passes = ForwardPasses(blocks)
    x = torch.ones(1, 2)
    with torch.no_grad():
        for _ in range(50):
            for block in blocks:
                with passes.running(block, (x,)):
                    passes.end(x.clone())
    for block in blocks:
        with passes.running(block, (x,)):
            passes.end(block(x))
    started = time.process_time()
    verdict = passes.settle(opened_by_run=False, is_ended=True)
    assert len(verdict.apart) == 2000
    assert time.process_time() - started < 0.5
