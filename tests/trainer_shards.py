"""A training of ``transformers.Trainer`` with FSDP on CPU processes, and on one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import tmm
from tmm.integrations.transformers import TMMCallback

STEPS, BATCH = 3, 4
SPEC = tmm.Spec(
    tmm.activation("rms", "absmax", "std"),
    tmm.activation_gradient("rms"),
    tmm.gradient("norm"),
    tmm.parameter("rms"),
    tmm.update("norm"),
)
SHARDED = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
WAYS: dict[str, dict[str, Any]] = {
    "one": {},
    "shards": {"fsdp_config": SHARDED},
    "accumulated": {"fsdp_config": SHARDED, "gradient_accumulation_steps": 2},
    "compiled": {
        "fsdp_config": SHARDED,
        "torch_compile": True,
        "torch_compile_backend": "aot_eager",
    },
    "checkpointed": {"fsdp_config": {**SHARDED, "activation_checkpointing": True}},
}


def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(config, name, 0.0)
    return GPT2LMHeadModel(config).double()


def texts() -> list[dict[str, torch.Tensor]]:
    drawn = torch.randint(64, (STEPS * BATCH, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": text, "labels": text} for text in drawn]


def trainer_of(folder: Path, way: str, callbacks: list[Any]) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = dict(WAYS[way])
    if "fsdp_config" in settings:
        settings |= {"fsdp": True, "ddp_backend": "gloo"}
    parts = settings.get("gradient_accumulation_steps", 1) * int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        str(folder / "output"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        save_strategy="no",
        logging_steps=1,
        max_steps=STEPS,
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        optim="adamw_torch",
        per_device_train_batch_size=BATCH // parts,
        train_sampling_strategy="sequential",
        **settings,
    )
    if "fsdp_config" in settings:
        # On processes without accelerators accelerate trains without shards, and says nothing.
        assert arguments.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Trainer(model(), arguments, train_dataset=texts(), callbacks=callbacks)


def trained(trainer: Trainer) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Parameters of this rank, and what was logged but for times."""
    trainer.train()
    parameters: Any = [p.detach() for p in trainer.model_wrapped.parameters()]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    history = [
        {key: value for key, value in logs.items() if "second" not in key and "runtime" not in key}
        for logs in trainer.state.log_history
    ]
    return [p.clone() for p in local], history


def main(folder_name: str, way: str) -> None:
    folder, rank = Path(folder_name), os.environ.get("RANK", "0")
    plain = trained(trainer_of(folder, way, []))
    torch._dynamo.reset()
    callback = TMMCallback(SPEC, root=folder / f"runs-{way}", system_seconds=None)
    watched = trainer_of(folder, way, [callback])
    parameters, history = trained(watched)
    told = {
        "is_undisturbed": all(map(torch.equal, parameters, plain[0])) and history == plain[1],
        "kinds": {type(p).__name__ for p in watched.model_wrapped.parameters()},
        "series": recorded(folder / f"runs-{way}") if rank == "0" else {},
    }
    torch.save(told, folder / f"{way}-{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def recorded(root: Path) -> dict[str, dict[int, float]]:
    (record,) = tmm.list_runs(root)
    with tmm.open_run(record.path) as run:
        series = {key: run.series(key) for key in run.keys()}  # noqa: SIM118
    return {
        key: dict(zip(steps.tolist(), values.tolist(), strict=True))
        for key, (steps, values) in series.items()
    }
