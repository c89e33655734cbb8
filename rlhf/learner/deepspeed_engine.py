"""The engine for one or more ranks: DeepSpeed ZeRO 0 to 3, gloo on CPUs and NCCL on GPUs.

Loads DeepSpeed, so import it only where it is used. AdamW is torch's: nothing is compiled for it.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when deepspeed is imported

import deepspeed

from rlhf.config import LearnerConfig
from rlhf.errors import RunFailed
from rlhf.learner.engine import Step, TrainedModel, adamw, check_optimized, trainable
from rlhf.models.policy import ModelInputs

TAG = "deepspeed"
_RENDEZVOUS_TIMEOUT = timedelta(minutes=10)


class DeepSpeedEngine:
    """AdamW over the ranks of the process group that `join` set up, which a policy and its critic share.

    ZeRO 1 shards optimizer states, 2 gradients too, 3 parameters too. bfloat16 keeps float32 masters. Gradients are
    accumulated in float32, but for ZeRO 0 in bfloat16, where DeepSpeed can only do it in bfloat16.
    """

    def __init__(self, policy: TrainedModel, config: LearnerConfig, world_size: int, *, leaves_group: bool) -> None:
        self.policy = policy
        self._leaves_group = leaves_group
        self._world_size, self._max_grad_norm = world_size, config.max_grad_norm
        self._sharded = config.zero_stage == 3
        # Without ZeRO and in float32 DeepSpeed clips without keeping the norm, so it is done here.
        self._clips_here = config.zero_stage == 0 and config.dtype == "float32"
        parameters = [parameter for _, parameter in trainable(policy)]
        optimizer = adamw(parameters, config)
        check_optimized(policy, optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            config=settings(config, world_size, clips_here=self._clips_here),
            dist_init_required=False,
        )
        if config.zero_stage in (1, 2):
            self._engine.optimizer.check_grad_overflow = True  # off in float32 unless asked for: NaN would be applied
        if self._clips_here:
            self._engine.set_gradient_accumulation_boundary(False)
        self._parameters = parameters
        self.device = torch.device(self._engine.device)

    def forward(self, inputs: ModelInputs) -> tuple[Tensor, ...]:
        self._engine.train(torch.is_grad_enabled())  # recomputation of activations is for training mode only
        answers: tuple[Tensor, ...] = self._engine(*inputs)
        return answers

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self._world_size, scale_wrt_gas=False)  # DeepSpeed averages over ranks

    def step(self, lr: float) -> Step:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._clips_here:
            return self._plain_step()
        skipped = self._engine.skipped_steps
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        applied = self._engine.skipped_steps == skipped
        return Step(float(norm) if applied else float("nan"), applied)

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        if not self._sharded:
            return nullcontext()
        context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)
        return context

    def any_rank(self, flags: Tensor) -> Tensor:
        counts = flags.to(device=self.device, dtype=torch.int32)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        return counts.bool().cpu()

    def save(self, folder: Path) -> None:
        """Every rank writes its shard into a folder that all ranks see."""
        self._engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if path is None:
            raise RunFailed(f"{folder} holds no trainer state that DeepSpeed can read (tag {TAG})")

    def close(self) -> None:
        """Where `leaves_group`, which must be the last to close, leaves the process group."""
        if dist.is_initialized():  # vLLM in the same process ends the group for all when it is closed
            self._engine.destroy()
            if self._leaves_group:
                dist.destroy_process_group()

    def _plain_step(self) -> Step:
        """Averages whole gradients over ranks, so that their norm is the same on all of them."""
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()  # does nothing away from a boundary
        self._engine.set_gradient_accumulation_boundary(False)
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
        applied = bool(torch.isfinite(torch.tensor(norm)))
        if applied:
            self._engine.optimizer.step()
        self._engine.zero_grad()
        return Step(norm, applied)


def join(rank: int, world_size: int, meeting_point: str | None) -> None:
    """Joins the process group of the ranks; one rank needs no network. meeting_point is host:port of rank 0."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    if dist.is_initialized():
        raise RunFailed("this process is already part of a process group: one trainer rank a process")
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(
            backend, init_method=f"tcp://{meeting_point}", rank=rank, world_size=world_size, timeout=_RENDEZVOUS_TIMEOUT
        )
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def settings(config: LearnerConfig, world_size: int, *, clips_here: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. The learner cuts micro-batches and says when to step, so its own counts are all 1."""
    bfloat16 = config.dtype == "bfloat16"
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": clips_here,
        "gradient_clipping": 0.0 if clips_here else config.max_grad_norm,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 31,
        "wall_clock_breakdown": False,
    }
    if bfloat16 and config.zero_stage > 0:
        options["data_types"] = {"grad_accum_dtype": "fp32"}
    return options
