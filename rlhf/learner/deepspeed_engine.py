"""The engine for one or more ranks: DeepSpeed ZeRO 0 to 3, gloo on CPUs and NCCL on GPUs.

Loads DeepSpeed, so import it only where it is used. AdamW is torch's: nothing is compiled for it.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when deepspeed is imported

import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from rlhf.colocation import OFFLOADING_STAGE, no_offload
from rlhf.config import LearnerConfig
from rlhf.errors import BadInput, RunFailed
from rlhf.learner.build_locks import free_abandoned_locks
from rlhf.learner.engine import Step, TrainedModel, adamw, check_optimized, trainable
from rlhf.learner.state import (
    MOMENTS,
    TensorState,
    fresh_state,
    one_step_count,
    read_states,
    restore_states,
    states_of,
    write_states,
)
from rlhf.models.policy import ModelInputs

_RENDEZVOUS_TIMEOUT = timedelta(minutes=10)


class DeepSpeedEngine:
    """AdamW over the ranks of a process group, see `join`; a policy and a critic in one process share it.

    ZeRO 1 shards optimizer states, 2 gradients too, 3 parameters too. bfloat16 keeps float32 masters. Gradients are
    accumulated in float32, but for ZeRO 0 in bfloat16, where DeepSpeed can only do it in bfloat16.
    """

    def __init__(self, policy: TrainedModel, config: LearnerConfig, world_size: int, *, leaves_group: bool) -> None:
        self.policy = policy
        self._leaves_group = leaves_group
        self._world_size, self._max_grad_norm = world_size, config.max_grad_norm
        self._stage, self._sharded = config.zero_stage, config.zero_stage == 3
        # Without ZeRO and in float32 DeepSpeed clips without keeping the norm, so it is done here.
        self._clips_here = config.zero_stage == 0 and config.dtype == "float32"
        self._named = trainable(policy)
        self._parameters = [parameter for _, parameter in self._named]
        optimizer = adamw(self._parameters, config)
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
        elif self._stage == 0:
            self._undo_first_step()
        self.device = torch.device(self._engine.device)

    def forward(self, inputs: ModelInputs) -> tuple[Tensor, ...]:
        if self._stage == OFFLOADING_STAGE and self._engine.optimizer.offloaded_states:
            raise RunFailed("the model in training has given its GPU up: call reload before forward")
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
        """Rank 0 writes; the others take part in gathering."""
        write_states(self._states(), folder, write=dist.get_rank() == 0)

    def load(self, folder: Path) -> None:
        """Every rank reads the folder and keeps its part."""
        shapes = {name: self._shape_of(parameter) for name, parameter in self._named}
        if self._stage == 0:
            restore_states(read_states(folder, shapes), self._masters(), self._engine.basic_optimizer)
            self._publish_masters()
            return
        self._begin_moments()
        steps = {}
        for (name, parameter), state in zip(self._named, read_states(folder, shapes), strict=True):
            self._restore(parameter, state)
            steps[name] = state.step
        count = one_step_count(steps, folder)
        for master in self._masters():
            self._engine.basic_optimizer.state[master]["step"].fill_(count)

    def offload(self) -> None:
        """By DeepSpeed itself, which can do it under ZeRO 2. Raises BadInput under the others: its optimizers for ZeRO
        0, and for ZeRO 1 in bfloat16, have no such thing, and that for ZeRO 3 only with its own FusedAdam."""
        if self._stage != OFFLOADING_STAGE:
            raise BadInput(no_offload(self._stage))
        self._engine.offload_states(pin_memory=torch.cuda.is_available())

    def reload(self) -> None:
        optimizer = self._engine.optimizer
        if self._stage != OFFLOADING_STAGE or not optimizer.offloaded_states:
            return
        self._engine.reload_states()
        optimizer._hp_optimizer_states_linked = False  # the moments are other tensors now: see _begin_moments
        for state in self._engine.basic_optimizer.state.values():
            state["step"] = state["step"].cpu()  # where torch keeps it, so that no step waits for the GPU to tell it

    def close(self) -> None:
        """Where `leaves_group`, leaves the process group; whoever shares it must have closed before."""
        if dist.is_initialized():  # vLLM in the same process ends the group for all when it is closed
            self._engine.destroy()
            if self._leaves_group:
                dist.destroy_process_group()

    @torch.no_grad()
    def _undo_first_step(self) -> None:
        """In bfloat16 without ZeRO DeepSpeed takes an optimizer step of its own at the start, with zero gradients:
        weights would decay once for nothing, and the bias correction of every later step would be one step off."""
        self._engine.basic_optimizer.state.clear()
        for parameter, master in zip(self._parameters, self._masters(), strict=True):
            master.copy_(parameter)

    def _masters(self) -> list[nn.Parameter]:
        """The float32 tensors that AdamW holds: without ZeRO one a parameter, else this rank's flat parts."""
        if self._sharded:  # during a step alone ZeRO 3 shows them to the optimizer
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [master for group in self._engine.basic_optimizer.param_groups for master in group["params"]]

    def _states(self) -> Iterator[TensorState]:
        """Collective: whole tensors, one at a time, on every rank."""
        optimizer = self._engine.basic_optimizer
        if self._stage == 0:
            yield from states_of([name for name, _ in self._named], self._masters(), optimizer)
            return
        self._begin_moments()
        step = float(optimizer.state[self._masters()[0]]["step"])
        for name, parameter in self._named:
            weight = safe_get_full_fp32_param(parameter)
            if not self._sharded:  # whole tensors are sums over ranks, in which -0.0 becomes 0.0
                weight = torch.where(weight == 0, parameter.detach().float(), weight)
            first, second = (safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS)
            yield TensorState(name, weight, first, second, step)

    def _begin_moments(self) -> None:
        """Before the first step AdamW has no moments to read or to write: gives it those that it would start with."""
        state = self._engine.basic_optimizer.state
        for master in self._masters():
            if not state.get(master):
                state[master] = fresh_state(master)
        if not self._sharded:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()  # does nothing where they are known already

    @torch.no_grad()
    def _restore(self, parameter: nn.Parameter, state: TensorState) -> None:
        """Master, moments and the parameter itself, with the device's copies of whole tensors for a moment only."""
        weight, *moments = (tensor.to(self.device) for tensor in state.tensors.values())
        if not self._sharded:
            parameter.copy_(weight)
            safe_set_full_fp32_param(parameter, weight)
            for kind, moment in zip(MOMENTS, moments, strict=True):
                safe_set_full_optimizer_state(parameter, moment, kind)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(weight)
        safe_set_local_fp32_param(parameter, self._own_part(parameter, weight))
        for kind, moment in zip(MOMENTS, moments, strict=True):
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, moment), kind)

    def _own_part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """This rank's part under ZeRO 3, the last one padded; safe_set_full_* fails where ranks do not divide it."""
        size = safe_get_local_fp32_param(parameter).numel()
        padded = whole.new_zeros(size * self._world_size)
        padded[: whole.numel()] = whole.flatten()
        return padded.narrow(0, size * dist.get_rank(), size)

    def _shape_of(self, parameter: nn.Parameter) -> torch.Size:
        """Under ZeRO 3 the parameter itself is empty."""
        with self.gathered([parameter]):
            return parameter.shape

    @torch.no_grad()
    def _publish_masters(self) -> None:
        for parameter, master in zip(self._parameters, self._masters(), strict=True):
            if parameter is not master:
                parameter.copy_(master)

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


def join(rank: int, world_size: int, meeting_point: str | None) -> bool:
    """Joins the process group of the ranks; one rank needs no network. meeting_point is host:port of rank 0.

    Nobody listens at more than the address through which rank 0 is reached, unless GLOO_SOCKET_IFNAME or
    NCCL_SOCKET_IFNAME name another interface. False, and nothing to leave, where the process is that rank of such a
    group already. Raises RunFailed where it is part of another one."""
    if dist.is_initialized():
        found = (dist.get_rank(), dist.get_world_size())
        if found != (rank, world_size):
            raise RunFailed(
                f"this process is rank {found[0]} of {found[1]} of a process group and cannot be rank {rank} of "
                f"{world_size} of another one: one group of ranks a process"
            )
        return False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    host, _, port = (meeting_point or "127.0.0.1:0").rpartition(":")
    interface = _interface_to(host)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, interface)
    store = dist.HashStore() if world_size == 1 else _meet(host, int(port), rank, world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_RENDEZVOUS_TIMEOUT)
    free_abandoned_locks()
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return True


def _meet(host: str, port: int, rank: int, world_size: int) -> dist.TCPStore:
    """Where the ranks find each other. Rank 0 brings the socket: torch's own would listen at all addresses."""
    socket_of_rank_0 = socket.create_server((host, port)).detach() if rank == 0 else None
    return dist.TCPStore(
        host, port, world_size, rank == 0, timeout=_RENDEZVOUS_TIMEOUT, master_listen_fd=socket_of_rank_0
    )


def _interface_to(host: str) -> str:
    """The network interface through which this machine reaches a host (of IPv4); `lo` where that is itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # chooses the way there, sends nothing
        own = probe.getsockname()[0]
    return next(name for name, places in psutil.net_if_addrs().items() if own in {place.address for place in places})


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
