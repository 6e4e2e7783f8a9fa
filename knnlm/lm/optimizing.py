"""One training run of any module: steps, their learning rate, gradients, and a state on disk from which it goes on.

What is trained and on what is the caller's: a step is the losses that it yields. The state is safetensors, never
pickle: parameters, what AdamW keeps of them, the random numbers' state, and the caller's notes. A run that was stopped
and continued ends with the same bits as one that was not, on one machine.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from knnlm.errors import Conflict

STATE, RUN = "state.safetensors", "run.json"
CLIP_NORM = 1.0


def claim(work: Path, identity: Mapping[str, Any]) -> None:  # Any: JSON
    """Make the work folder, or check that it belongs to this run. Raises Conflict, naming what differs."""
    record = work / RUN
    if not record.exists():
        work.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(dict(identity), indent=2))
        return
    found = json.loads(record.read_text())
    for name, value in identity.items():
        if found.get(name) != value:
            raise Conflict(
                f"{work} holds an unfinished run with {name} {found.get(name)!r}, this one has {value!r}; "
                "remove the folder to start anew",
                param=name,
            )


def mixed_precision(device: torch.device) -> AbstractContextManager[None]:
    """Inside, passes on a GPU are in bfloat16. On processors they are in float32: those without instructions for
    bfloat16 take twenty times as long with it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def optimize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    work: Path,
    *,
    steps: int,
    rate: Callable[[int], float],
    losses: Callable[[int], Iterable[Tensor]],
    notes: dict[str, Any],
    on_step: Callable[[int, float, float], None],
    save_seconds: float,
) -> float:
    """Train in place up to `steps`, from the state in `work` if there is one. Returns the seconds spent, earlier runs
    included.

    rate: learning rate of a step, counted from 0. losses: called for every step in turn, from the first one; what it
    yields adds up to the step's loss, and each is differentiated before the next is asked for. notes: JSON that belongs
    to the state; what was saved is in it before the first step. on_step(steps done, loss, seconds of this step) is
    called before the state is saved.
    """
    device = next(model.parameters()).device
    first, spent = _load(work, model, optimizer, notes)
    model.train()
    started = saved = time.monotonic()
    for step in range(first, steps):
        begin = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        total = 0.0
        for loss in losses(step):
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        now = time.monotonic()
        on_step(step + 1, total, now - begin)
        if now - saved > save_seconds or step + 1 == steps:
            _save(work, model, optimizer, device, {"step": step + 1, "seconds": spent + now - started, "notes": notes})
            saved = now
    return spent + time.monotonic() - started


def _save(
    work: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, record: Mapping[str, Any]
) -> None:
    tensors = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value.contiguous()
    temporary = work / f"{STATE}.tmp"
    save_file(tensors, temporary, metadata={name: json.dumps(value) for name, value in record.items()})
    os.replace(temporary, work / STATE)


def _load(work: Path, model: nn.Module, optimizer: torch.optim.Optimizer, notes: dict[str, Any]) -> tuple[int, float]:
    """(steps done, seconds spent) of the saved state, loaded into model, optimizer and notes; (0, 0.0) without one."""
    path = work / STATE
    if not path.exists():
        return 0, 0.0
    with safe_open(path, framework="pt") as file:
        record = {name: json.loads(value) for name, value in file.metadata().items()}
    tensors = load_file(path)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors[f"optimizer.{key}.{name}"]
                optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
    notes.update(record["notes"])
    return int(record["step"]), float(record["seconds"])
