"""Attention, per head: against a plain float64 implementation that eager forwards are given."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import tmm
from tests.eager_hooks import Expected, Tolerance, assert_agrees, site_names
from tests.model_zoo import CASES
from tests.test_reference import run

STATISTICS = (
    *("entropy", "normalized_entropy", "logsumexp"),
    *("max_probability", "sink_mass", "max_logit"),
)
PARTS = ("query", "key", "value", "activation")
SINGLE = Tolerance(1e-4, 1e-4)
FORBIDDING = -9999.0
ATTEND = functional.scaled_dot_product_attention


def by_hand(
    q: Any, k: Any, v: Any, mask: Any = None, causal: bool = False, scale: Any = None
) -> Any:
    """Logits, probabilities and what is allowed, in float64, whole."""
    q, k = q.double(), k.double()
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3) if q.dim() > 2 else k
    logits = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        logits, allowed = logits + mask.double(), allowed & (mask > FORBIDDING)
    logits = torch.where(allowed, logits, -math.inf)
    return logits, torch.softmax(logits, -1), allowed


def statistics(logits: Any, p: Any, allowed: Any) -> dict[str, tuple[float, float]]:
    """Sum or maximum, and count, of one head over the queries that may see a key."""
    some = allowed.any(-1)
    logits, p, allowed = logits[some], p[some], allowed[some]
    entropy = -torch.special.xlogy(p, p).sum(-1)
    keys = allowed.sum(-1).double()
    normalized = torch.where(keys > 1, entropy / keys.clamp(min=2).log(), 0.0)
    rows = (entropy, normalized, logits.logsumexp(-1), p.amax(-1), p[:, 0])
    values = {
        n: (float(r.sum()), float(some.sum())) for n, r in zip(STATISTICS, rows, strict=False)
    }
    return values | {"max_logit": (float(logits.max()), 1.0)}


class Recorder:
    """Attention that measures itself, by the module that is running."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[float, float]]] = {}
        self.parts: dict[str, list[torch.Tensor]] = {}
        self.running: list[tuple[str, list[int]]] = []

    def attend(
        self,
        q: Any,
        k: Any,
        v: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Any = None,
        enable_gqa: bool = False,
    ) -> Any:
        name, calls = self.running[-1]
        site = f"{name}.call_{len(calls)}" if calls else name
        calls.append(0)
        more = {"enable_gqa": True} if enable_gqa else {}
        output = ATTEND(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **more)
        heads = by_hand(q.detach(), k.detach(), v, attn_mask, is_causal, scale)
        for head in range(q.shape[-3] if q.dim() > 2 else 1):
            own = [x[..., head, :, :] if q.dim() > 2 else x for x in heads]
            for key, value in statistics(*own).items():
                self.values.setdefault(f"attention_{key}/{site}.head_{head}", []).append(value)
        for name, part in zip(PARTS, (q, k, v, output), strict=True):
            for head in range(part.shape[-3] if part.dim() > 2 else 1):
                own = part[..., head, :, :] if part.dim() > 2 else part
                self.parts.setdefault(f"activation/{site}.head_{head}.{name}/rms", []).append(
                    own.detach().double().reshape(-1)
                )
        return output

    @contextmanager
    def recording(self, module: nn.Module) -> Iterator[None]:
        handles = []
        for name, child in site_names(module).items():

            def enter(_: Any, __: Any, name: str = name) -> None:
                self.running.append((name, []))

            def leave(*_: Any) -> None:
                self.running.pop()

            handles.append(child.register_forward_pre_hook(enter))
            handles.append(child.register_forward_hook(leave))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "scaled_dot_product_attention", self.attend)
            yield
        for handle in handles:
            handle.remove()

    def expected(self) -> dict[str, Expected]:
        values = {}
        for key, items in self.values.items():
            value = sum(total for total, _ in items) / sum(count for _, count in items)
            if "max_logit" in key:
                value = max(total for total, _ in items)
            values[key] = Expected(value, max(abs(value), 1e-2))
        for key, parts in self.parts.items():
            value = float(torch.cat(parts).square().mean().sqrt())
            values[key] = Expected(value, value)
        return values


def expected(module: nn.Module, batches: list[Mapping[str, Any]]) -> dict[str, Expected]:
    recorder = Recorder()
    module = copy.deepcopy(module)
    with recorder.recording(module), torch.no_grad():
        for index, batch in enumerate(batches):
            torch.manual_seed(index)
            module(**batch)
    return recorder.expected()


ALL = tmm.attention(*STATISTICS, "rms")


def check(
    module: nn.Module,
    *batches: Mapping[str, Any],
    backend: str = "aot_eager",
    allowed: Tolerance = SINGLE,
    without: str = "nothing",
    want: dict[str, Expected] | None = None,
) -> tmm.Explanation:
    want = expected(module, list(batches)) if want is None else want
    want = {key: value for key, value in want.items() if without not in key}
    model = tmm.instrument(torch.compile(module, backend=backend), tmm.Spec(ALL))
    for step in range(2):
        values = run(model, list(batches), step)
        assert_agrees({k: v for k, v in values.items() if without not in k}, want, allowed)
    return tmm.explain(model)


QUERIES = ("query", "q_proj", "k_proj", "key", "c_attn", ".q.", ".k.")


def sharpened(module: nn.Module) -> nn.Module:
    """Weights such that attention is far from uniform, and heads differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in QUERIES) and parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


NAMES = (
    *("GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"),
    *("WhisperForConditionalGeneration", "ViTForImageClassification"),
)


def padded(batch: dict[str, Any]) -> dict[str, Any]:
    if "attention_mask" not in batch:
        return batch
    mask = batch["attention_mask"].clone()
    mask[0, -3:] = 0
    return batch | {"attention_mask": mask}


# What a compiler does to attention, and torch's operator, shows in the forms of a call below. Each
# model writes its own attention in another way; that of T5 adds positions.
OWN, BOTH = ("eager",), ("sdpa", "eager")
QUICK = {
    "GPT2LMHeadModel": BOTH,
    "LlamaForCausalLM": OWN,
    "BertForMaskedLM": OWN,
    "T5ForConditionalGeneration": OWN,
}


@pytest.mark.parametrize(
    ("name", "backend", "implementations"),
    [
        *((name, "eager", implementations) for name, implementations in QUICK.items()),
        *(
            pytest.param(name, "eager", BOTH, marks=pytest.mark.slow)
            for name, implementations in QUICK.items()
            if implementations == OWN
        ),
        *(pytest.param(name, "aot_eager", BOTH, marks=pytest.mark.slow) for name in NAMES),
    ],
)
def test_models_with_torch_s_attention_and_with_their_own(
    name: str, backend: str, implementations: tuple[str, ...]
) -> None:
    module = sharpened(CASES[name].build()).eval()
    batch = padded(dict(CASES[name].batch()))
    module.set_attn_implementation("sdpa")
    want = expected(module, [batch])
    assert any(value.value > 0.5 for key, value in want.items() if "max_prob" in key)
    for implementation in implementations:
        torch._dynamo.reset()
        module.set_attn_implementation(implementation)
        explanation = check(module, batch, want=want, backend=backend)
    assert not [name for name in explanation.unmeasured if "(attention)" in name]


class Calls(nn.Module):
    """One module that calls attention in one way."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = Inner(call)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y


class Inner(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False)
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).unbind(-3)
        y: torch.Tensor = self.call(*(part.transpose(-3, -2) for part in (q, k, v)))
        return y


def random_mask(*shape: int, boolean: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    allowed = torch.rand(shape, generator=generator) > 0.4
    if boolean:
        return allowed
    return torch.where(allowed, torch.randn(shape, generator=generator), -math.inf)


F = functional
BOOLEAN, FLOAT = random_mask(7, 7, boolean=True), random_mask(7, 7, boolean=False)
FLOAT_OF_HEADS = random_mask(4, 7, 7, boolean=False)
CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()
CALLS: dict[str, Callable[..., Any]] = {
    "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True),
    "scaled": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=3.0),
    "boolean": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BOOLEAN),
    "float mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=FLOAT_OF_HEADS),
    "row of no keys": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.arange(7)[:, None].expand(7, 7) > 2
    ),
    "fewer keys": lambda q, k, v: F.scaled_dot_product_attention(q, k[..., :3, :], v[..., :3, :]),
    "fewer queries": lambda q, k, v: F.scaled_dot_product_attention(q[..., -2:, :], k, v),
    "wider values": lambda q, k, v: F.scaled_dot_product_attention(q, k, torch.cat([v, v, v], -1)),
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[..., :2, :, :], v[..., :2, :, :], is_causal=True, enable_gqa=True
    ),
    "one token": lambda q, k, v: F.scaled_dot_product_attention(
        q[..., :1, :], k[..., :1, :], v[..., :1, :]
    ),
    "twice": lambda q, k, v: F.scaled_dot_product_attention(
        F.scaled_dot_product_attention(q, k, v), k, v, is_causal=True
    ),
}


def batch_of(*shape: int) -> dict[str, torch.Tensor]:
    return {"x": 3 * torch.randn(*shape, 16, generator=torch.Generator().manual_seed(0))}


class All(nn.Module):
    """Attention in each of several ways, from one compilation: it is this that takes long."""

    def __init__(self, calls: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.forms = nn.ModuleDict({name: Inner(call) for name, call in calls.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: form(x) for name, form in self.forms.items()}


# A few are enough to see that a compiler keeps the operator.
FEW = {name: CALLS[name] for name in ("causal", "float mask", "grouped", "twice")}
ONE = {"float mask": CALLS["float mask"]}


@pytest.mark.parametrize(
    ("calls", "backend"),
    [
        *[(CALLS, "eager"), (FEW, "aot_eager")],
        pytest.param(ONE, "inductor", marks=pytest.mark.slow),  # flex is compiled by default
        *[pytest.param(CALLS, name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor")],
    ],
    ids=["all-eager", "few-aot_eager", "one-inductor", "all-aot_eager", "all-inductor"],
)
def test_forms_of_a_call(calls: dict[str, Callable[..., Any]], backend: str) -> None:
    torch.manual_seed(0)
    module = All(calls)
    # A second size is compiled again, for any size, which takes long.
    batches = [batch_of(3, 7), batch_of(2 if calls is CALLS else 3, 7)]
    want = expected(module, batches)
    assert {key.split("/")[1].split(".")[1] for key in want} == calls.keys()
    check(module, *batches, backend=backend, want=want)


def test_without_a_batch() -> None:
    torch.manual_seed(0)
    check(Calls(CALLS["causal"]), batch_of(7))


def test_a_single_head_without_a_dimension_for_it() -> None:
    torch.manual_seed(0)
    module = Calls(lambda q, k, v: F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]))
    check(module, batch_of(3, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_and_sharp_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Calls(CALLS["causal"]).to(dtype)
    with torch.no_grad():
        module.inner.qkv.weight[:32] *= 8  # logits of a standard deviation of about 16
    batch = {"x": batch_of(2, 40)["x"].to(dtype)}
    want = expected(module, [batch])
    assert want["attention_max_logit/inner.head_0"].value > 20
    check(module, batch, want=want)


def integers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    allowed = CAUSAL.long()
    logits = torch.matmul(input=q, other=k.mT) / 2
    p = functional.softmax(input=logits + (1 - allowed) * -10000, dim=-1)
    return torch.matmul(input=functional.dropout(input=p, p=0.3), other=v)


def shared_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q[:1, 0] @ k.mT / 2, dim=3) * HEAD_MASK @ v


HEAD_MASK = torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None, None]


def test_further_forms_by_hand() -> None:
    for call, like in (
        (integers, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        (
            shared_query,
            lambda q, k, v: F.scaled_dot_product_attention(q[:1, 0].expand(3, 4, 7, 4), k, v),
        ),
    ):
        torch.manual_seed(0)
        module = Calls(call)
        same = copy.deepcopy(module)
        same.inner.call = like
        want = expected(same, [batch_of(3, 7)])
        want = {key: value for key, value in want.items() if "attention_" in key}
        model = tmm.instrument(torch.compile(module, backend="aot_eager"), tmm.Spec(ALL))
        values = run(model, [batch_of(3, 7)])
        assert_agrees({k: v for k, v in values.items() if "attention_" in k}, want, SINGLE)


def softmax_by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: str) -> torch.Tensor:
    mask, causal = FLOAT, CAUSAL
    scale = 1 / math.sqrt(q.shape[-1])
    if form == "matmul":
        p = torch.softmax(q @ k.transpose(-2, -1) * scale, -1)
    elif form == "divided":
        logits = torch.matmul(q, k.mT) / math.sqrt(q.shape[-1])
        logits += mask
        p = functional.dropout(logits.float().softmax(dim=-1).type_as(q), 0.3)
    elif form == "filled":
        p = (q @ k.mT * scale).masked_fill(~causal, -math.inf).softmax(-1)
    elif form == "chosen":
        logits = torch.where(causal, q @ k.mT * scale, torch.finfo(q.dtype).min)
        p = nn.Dropout(0.2)(functional.softmax(logits, dim=-1, dtype=torch.float32))
    elif form == "joined":
        joined = [x.flatten(0, 1) for x in (q, k)]
        logits = torch.baddbmm(mask[None].expand(12, 7, 7), joined[0], joined[1].mT, alpha=scale)
        p = logits.view(3, 4, 7, 7).softmax(-1)
        return torch.bmm(p.view(12, 7, 7), v.flatten(0, 1)).view(3, 4, 7, 4)
    elif form == "both":
        p = ((q @ k.mT * scale).masked_fill(~causal, -1e9) + mask.clamp(min=-20000)).softmax(-1)
    return p.to(v.dtype) @ v


EQUAL = {
    "matmul": {},
    "divided": {"attn_mask": FLOAT},
    "filled": {"is_causal": True},
    "chosen": {"is_causal": True},
    "joined": {"attn_mask": FLOAT},
    "both": {"attn_mask": FLOAT.masked_fill(~CAUSAL, -math.inf)},
}


def test_attention_written_out_by_hand() -> None:
    torch.manual_seed(0)
    module = All(
        {form: (lambda q, k, v, form=form: softmax_by_hand(q, k, v, form)) for form in EQUAL}
    )
    same = copy.deepcopy(module)
    for form, options in EQUAL.items():
        same.forms[form].call = lambda q, k, v, options=options: F.scaled_dot_product_attention(
            q, k, v, **options
        )
    want = expected(same, [batch_of(3, 7)])
    model = tmm.instrument(torch.compile(module, backend="aot_eager"), tmm.Spec(ALL))

    def compared(values: Mapping[str, Any]) -> dict[str, Any]:
        """Without outputs of those that drop out."""
        dropping = ("activation/forms.divided.", "activation/forms.chosen.")
        return {
            key: value
            for key, value in values.items()
            if not (key.startswith(dropping) and ".activation/" in key)
        }

    for step in range(2):
        values = run(model, [batch_of(3, 7)], step)
        assert_agrees(compared(values), compared(want), SINGLE)


OVER = "overwritten"


def in_place(q: Any, k: Any, v: Any, change: Callable[[torch.Tensor], object]) -> Any:
    logits = q @ k.mT
    change(logits)
    return logits.softmax(-1) @ v


def changed_constant(q: Any, k: Any, v: Any) -> Any:
    scale = torch.full([], 2.0)
    scale.mul_(3)
    return ((q @ k.mT) / scale).softmax(-1) @ v


def einsum_attention(q: Any, k: Any, v: Any) -> Any:
    p = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", p, v)


def grouped_by_hand(q: Any, k: Any, v: Any) -> Any:
    groups = q.unflatten(1, (2, 2)) @ k[:, :2, None].mT
    return groups.reshape(*q.shape[:2], 7, 7).softmax(-1) @ v


def windows(q: Any, k: Any, v: Any) -> Any:
    logits = (q @ k.mT).view(-1, 1, 4, 7, 7) + FLOAT_OF_HEADS
    return logits.view(-1, 4, 7, 7).softmax(-1) @ v


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda q, k, v: torch.softmax((q @ k.mT).tanh(), -1) @ v, "pass tanh"),
        (lambda q, k, v: torch.softmax(q @ k.mT * v.mean(), -1) @ v, "multiplied by a tensor"),
        (lambda q, k, v: torch.softmax(q[:, 0] @ k[:, 0].mT, -1) @ v[:, 0], "has the heads"),
        (lambda q, k, v: torch.softmax((q @ k.mT + v.mean()) * 2, -1) @ v, "after a mask"),
        (lambda q, k, v: torch.softmax(q @ k.mT + v @ v.mT, -1) @ v, "two products"),
        (lambda q, k, v: torch.softmax(q @ k.mT + 1, -1) @ v, "a number is added"),
        (lambda q, k, v: torch.softmax(q @ k[0, 0].mT, -1) @ v[..., :7, :], "the same keys"),
        (lambda q, k, v: (q @ k.mT).softmax(-2).mT @ v, "not over the last dimension"),
        (lambda q, k, v: torch.einsum("bhij,bhjd->bhid", (q @ k.mT).softmax(-1), v), "weighs"),
        (lambda q, k, v: einsum_attention(q, k, v), "pass einsum"),
        (lambda q, k, v: grouped_by_hand(q, k, v), "are regrouped"),
        (lambda q, k, v: windows(q, k, v), "are regrouped"),
        (lambda q, k, v: in_place(q, k, v, lambda a: a.masked_fill_(~CAUSAL, -math.inf)), OVER),
        (lambda q, k, v: in_place(q, k, v, lambda a: a.div_(2)), OVER),
        (lambda q, k, v: in_place(q, k, v, lambda a: a[..., 0].mul_(3)), OVER),
        (lambda q, k, v: in_place(q, k, v, lambda a: F.relu(a, inplace=True)), OVER),
        (lambda q, k, v: in_place(q, k, v, lambda a: a.diagonal(0, -2, -1).zero_()), OVER),
        (lambda q, k, v: in_place(q, k, v, lambda a: a.__setitem__((..., 0), 3.0)), OVER),
        (lambda q, k, v: changed_constant(q, k, v), OVER),
    ],
)
def test_what_is_not_matched_is_stated(call: Callable[..., Any], reason: str) -> None:
    model = tmm.instrument(torch.compile(Calls(call), backend="eager"), tmm.Spec(ALL))
    assert run(model, [batch_of(3, 7)]) == {}
    assert reason in tmm.explain(model).unmeasured["inner (attention)"]


def test_a_softmax_that_weighs_nothing_is_no_attention() -> None:
    module = Calls(lambda q, k, v: torch.softmax(q, -1) * v)
    model = tmm.instrument(torch.compile(module, backend="eager"), tmm.Spec(ALL))
    assert run(model, [batch_of(3, 7)]) == {}
    assert not tmm.explain(model).unmeasured


class MultiHead(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, **options)

    def forward(self, x: torch.Tensor, **options: Any) -> Any:
        return self.attention(3 * x, 2 * x, x, **options)[0]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_multi_head_attention(need_weights: bool, padding: bool) -> None:
    torch.manual_seed(0)
    module = MultiHead(batch_first=True, dropout=0.2, bias=not padding)
    batch: dict[str, Any] = {"x": batch_of(3, 7)["x"], "need_weights": False}
    if padding:
        batch["key_padding_mask"] = torch.arange(7).expand(3, 7) > torch.tensor([[6], [4], [2]])
        batch["attn_mask"] = ~torch.ones(7, 7, dtype=torch.bool).tril()
    want = expected(module, [batch])
    explanation = check(
        module,
        batch | {"need_weights": need_weights},
        want=want,
        without=".activation/",
        backend="aot_eager" if padding else "eager",
    )
    assert not explanation.unmeasured


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Inner(CALLS["causal"])
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.out(self.attention(x).transpose(-3, -2).flatten(-2))
        return y


class Stack(nn.Module):
    def __init__(self, *, checkpointed: bool = False, shared: bool = False) -> None:
        super().__init__()
        blocks = [Block() for _ in range(2)]
        self.blocks = nn.ModuleList([blocks[0]] * 2 if shared else blocks)
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


@pytest.mark.parametrize(
    ("kind", "backend"), [("checkpointed", "aot_eager"), ("shared", "eager"), ("blocks", "eager")]
)
def test_structures(kind: str, backend: str) -> None:
    torch.manual_seed(0)
    module = Stack(checkpointed=kind == "checkpointed", shared=kind == "shared")
    batches = [batch_of(3, 7), batch_of(3 if kind == "checkpointed" else 2, 5)]
    want = expected(module, batches)
    model: Any = module
    if kind == "blocks":
        for block in module.blocks:
            block.compile(backend=backend)
    else:
        model = torch.compile(module, backend=backend)
    model = tmm.instrument(model, tmm.Spec(ALL))
    for step in range(2):
        values = run(model, batches, step)
        assert_agrees(values, want, SINGLE)


def test_pooled_heads_and_some_queries(tmp_path: Any) -> None:
    torch.manual_seed(0)
    module = Calls(CALLS["causal"])
    spec = tmm.Spec(
        tmm.attention("entropy", "max_logit", "rms", heads="pooled"),
        tmm.attention("entropy", queries=3, l2=lambda x: x.norm(dim=-1)),
    )
    with torch.no_grad():
        q, k, v = (
            part.transpose(1, 2)
            for part in module.inner.qkv(batch_of(3, 7)["x"]).unflatten(-1, (3, 4, 4)).unbind(-3)
        )
    model = tmm.instrument(torch.compile(module, backend="eager"), spec, run=tmp_path / "run")
    values = run(model, [batch_of(3, 7)])
    logits, p, _ = by_hand(q, k, v, causal=True)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    want = {
        "attention_entropy/inner": entropy.mean(),
        "attention_max_logit/inner": logits.max(),
        "activation/inner.query/rms": q.square().mean().sqrt(),
    }
    for head in range(4):
        want[f"attention_entropy/inner.head_{head}"] = entropy[:, head, ::3].mean()
        want[f"activation/inner.head_{head}.key/l2"] = k[:, head].norm(dim=-1).mean()
    for key, value in want.items():
        assert values[key] == pytest.approx(float(value), rel=1e-5), key
    tmm.remove(model)
    with tmm.open_run(tmp_path / "run") as opened:
        notes = opened.key_info("attention_entropy/inner.head_0").notes
        assert notes == "of at most 3 evenly spaced queries"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_training_is_undisturbed(backend: str) -> None:
    def losses(watch: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        module = nn.Sequential(
            Block(), nn.TransformerEncoderLayer(16, 4, 32, dropout=0.2, batch_first=True), Block()
        )
        module[0].attention.call = lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, dropout_p=0.3, is_causal=True
        )
        module[2].attention.call = lambda q, k, v: softmax_by_hand(q, k, v, "divided")
        model: Any = torch.compile(module, backend=backend)
        if watch:
            model = tmm.instrument(model, tmm.Spec(ALL))
            tmm.monitor(model).begin_step(0)
        loss = model(batch_of(3, 7)["x"]).square().mean()
        loss.backward()
        if watch:
            tmm.monitor(model).end_step()
            sites = {key.split("/")[1] for key in tmm.monitor(model).get_step_metrics()}
            assert {"0.attention.head_3", "1.self_attn.head_0", "2.attention.head_1"} <= sites
        return [loss, *(p.grad for p in module.parameters())], torch.get_rng_state()

    (plain, state), (watched, state_watched) = losses(False), losses(True)
    assert all(map(torch.equal, plain, watched))
    assert torch.equal(state, state_watched)


def test_together_with_a_reference() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Block(), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True))
    spec = tmm.Spec(ALL, tmm.activation_difference("norm"), reference="init")
    model = tmm.instrument(torch.compile(module, backend="aot_eager"), spec)
    monitor = tmm.monitor(model)
    with monitor.step(0):
        model(batch_of(3, 7)["x"]).sum().backward()
    values = monitor.get_step_metrics()
    differences = [value for key, value in values.items() if "difference" in key]
    assert differences
    # Products of transposed tensors depend, in their last digit, on whether these need a gradient.
    assert max(differences) < 1e-5
    assert "attention_entropy/1.self_attn.head_3" in values


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])


def window(width: int, length: int) -> BlockMask:
    def allowed(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query - key < width) & (key != 1)

    return create_block_mask(allowed, None, None, length, length, device="cpu")


def flexible(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grouped: bool,
    blocks: Callable[[], BlockMask],
) -> torch.Tensor:
    def score(logit: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return logit - SLOPES[head] * (query - key) + 0.1 * batch

    q, k, v = (x.contiguous() for x in (q, *(x[:, :2] if grouped else x for x in (k, v))))
    output = flex_attention(q, k, v, score_mod=score, block_mask=blocks(), enable_gqa=grouped)
    assert isinstance(output, torch.Tensor)
    return output


@pytest.mark.parametrize(
    ("backend", "grouped", "length", "inside"),  # whether it makes its mask itself
    [
        ("aot_eager", True, 470, True),  # several blocks, of which some are masked, and some not
        ("inductor", False, 40, False),
        *(
            pytest.param(backend, grouped, length, True, marks=pytest.mark.slow)
            for backend in ("aot_eager", "inductor")
            for grouped in (False, True)
            for length in (40, 1100)
        ),
    ],
)
def test_flex_attention(backend: str, grouped: bool, length: int, inside: bool) -> None:
    torch.manual_seed(0)
    width = length * 6 // 11
    made = window(width, length)
    blocks = (lambda: window(width, length)) if inside else (lambda: made)
    module = Calls(lambda q, k, v: flexible(q, k, v, grouped, blocks)).eval()
    query, key = torch.arange(length)[:, None], torch.arange(length)
    mask = -SLOPES[:, None, None] * (query - key) + 0.1 * torch.arange(2)[:, None, None, None]
    mask = mask.masked_fill((key > query) | (query - key >= width) | (key == 1), -math.inf)
    same = copy.deepcopy(module)
    same.inner.call = lambda q, k, v: F.scaled_dot_product_attention(
        *((q, k[:, :2], v[:, :2]) if grouped else (q, k, v)), mask, enable_gqa=grouped
    )
    batch = batch_of(2, length)
    with torch.no_grad():  # a CPU has no gradient of it
        want = expected(same, [batch])
        model = tmm.instrument(torch.compile(module, backend=backend), tmm.Spec(ALL))
        with tmm.monitor(model).step(0):
            model(**batch)
    assert_agrees(tmm.monitor(model).get_step_metrics(), want, SINGLE)


def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return torch.compiler.disable(F.scaled_dot_product_attention)(q, k, v)


class Interrupted(Inner):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.transpose(-3, -2) for part in self.qkv(x).unflatten(-1, (3, 4, 4)).unbind(-3)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        torch._dynamo.graph_break()
        return y + F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_attention_after_a_graph_break_in_its_module_is_stated() -> None:
    torch.manual_seed(0)
    module = Calls(CALLS["plain"])
    module.inner = Interrupted(CALLS["plain"])
    want = {k: v for k, v in expected(module, [batch_of(3, 7)]).items() if "call_1" not in k}
    model = tmm.instrument(torch.compile(module, backend="aot_eager"), tmm.Spec(ALL))
    assert_agrees(run(model, [batch_of(3, 7)]), want, SINGLE)
    assert "follows a graph break" in tmm.explain(model).unmeasured["inner (attention)"]


def test_attention_outside_of_graphs_is_stated() -> None:
    model = tmm.instrument(torch.compile(Calls(broken), backend="aot_eager"), tmm.Spec(ALL))
    assert not run(model, [batch_of(3, 7)])
    reason = tmm.explain(model).unmeasured["attention outside of graphs"]
    assert "outside ran inner" in reason


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tmm.attention(), "measures nothing"),
        (lambda: tmm.attention("entropie"), "Did you mean 'entropy'"),
        (lambda: tmm.attention("histogram"), "unknown metric 'histogram'"),
        (lambda: tmm.attention("entropy", heads="some"), "heads='some'"),  # type: ignore[arg-type]
        (lambda: tmm.attention("entropy", queries=0), "queries=0"),
        (lambda: tmm.attention("entropy", aggregate="max"), "aggregate= belongs"),
        (lambda: tmm.attention(f=torch.mean, aggregate=torch.median), "cannot be a function"),
    ],
)
def test_mistakes_in_a_rule(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        make()


def test_two_rules_that_differ_in_their_queries_collide() -> None:
    spec = tmm.Spec(tmm.attention("entropy"), tmm.attention("entropy", queries=4))
    with pytest.raises(ValueError, match="both give the metric 'entropy'"):
        tmm.instrument(torch.compile(Calls(CALLS["plain"])), spec)
    text = str(tmm.attention("entropy", modules="a", heads="pooled", queries=4))
    assert text == "tmm.attention('entropy', modules='a', heads='pooled', queries=4)"


def test_keys_and_values_of_torch_module_monitor() -> None:
    peer = pytest.importorskip("torch_module_monitor")
    torch.manual_seed(0)
    module, batch = Calls(CALLS["causal"]), batch_of(3, 7)
    monitor = peer.ModuleMonitor(monitor_step_fn=lambda step: True)
    monitor.add_activation_metric("l2norm", lambda x: x.norm(dim=-1), r".*head_\d+\..*")
    monitor.set_module(module)

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output = CALLS["causal"](q, k, v)
        peer.monitor_scaled_dot_product_attention(
            monitor, module.inner, q, k, v, is_causal=True, activation=output
        )
        return output

    module.inner.call = watched
    monitor.begin_step(0)
    module(**batch)
    monitor.end_step()
    want = {
        key: Expected(value, max(abs(value), 1e-2))  # it adds 1e-8 to each probability
        for key, value in monitor.get_step_metrics().items()
    }
    assert len(want) == 4 * 5
    torch.manual_seed(0)
    module = Calls(CALLS["causal"])
    rule = tmm.attention("entropy", l2norm=lambda x: x.norm(dim=-1))
    model = tmm.instrument(torch.compile(module, backend="aot_eager"), tmm.Spec(rule))
    assert_agrees(run(model, [batch]), want, SINGLE)
