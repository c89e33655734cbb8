"""Sampling with vLLM inside this process: token ids in, token ids and log-probabilities out.

Text is never tokenised here and ids are never decoded and encoded again. With tensor parallelism the layers are in
processes of their own, which vLLM starts; what schedules and counts stays here.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import psutil
import torch

from rlhf.colocation import no_sleep
from rlhf.errors import BadInput, EngineLost, RunFailed
from rlhf.experience import Floats, Ids, Prompt, Sampling
from rlhf.generation.engine import Draw, StepwiseGroups, VersionedGenerator
from rlhf.generation.vllm_weights import RANK_EXTENSION, shared, silenced, take
from rlhf.weights import Weights

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.logprobs import Logprob

GIB = 2**30
REAP_TIMEOUT_S = 10.0
TOKENS_PER_STEP = 4096  # of prompts that are read in one step of the engine, on a CPU

# vLLM reads these at its import, so they are set before it. What the user has set stays.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: starts in seconds, dies with it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads are counted by OMP_NUM_THREADS and pinned to no core
    "GLOO_SOCKET_IFNAME": "lo",  # one process, or several on one node: nobody else is to find its process group
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings at a start are a dozen lines that call for nothing
}

RANKS_ENVIRONMENT = {
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with threads, Ray's or CUDA's, may hang
}


class VllmGenerator(VersionedGenerator):
    """A rollout engine on vLLM, CPU or GPU: in this process, or with a share of each layer in each of
    `tensor_parallel` processes. Decoder-only models only: vLLM has no T5.

    All prompts of a call are in flight together; a sample's tokens come from its own seed, whatever runs beside it.
    """

    _llm: "LLM"

    def _start(self) -> None:
        self._ranks = self._spec.tensor_parallel
        for name, value in {**ENVIRONMENT, **(RANKS_ENVIRONMENT if self._ranks > 1 else {})}.items():
            os.environ.setdefault(name, value)
        self._cpu = not torch.cuda.is_available()
        if self._spec.sleeps and self._cpu:
            raise BadInput(no_sleep(f"{self._spec.name}, on a machine without a GPU"))
        if self._ranks > 1:
            resource_tracker.ensure_running()  # the interpreter's own process, not the engine's; it ends with this one
        self._children_before = {child.pid for child in psutil.Process().children(recursive=True)}
        spec = self._spec
        # On a CPU vLLM compiles for up to a minute at each start (its own cache fails to load) for 3 % of speed: eager.
        with thread_setting_kept(), threads_passed_on() if self._ranks > 1 else nullcontext():
            from vllm import LLM

            self._llm = LLM(
                str(spec.model),
                dtype=spec.dtype,
                trust_remote_code=spec.trust_remote_code,
                max_model_len=spec.max_sequence_tokens,
                # One more for the probe, which must find a place beside the samples in flight.
                max_num_seqs=spec.max_sequences + spec.mid_sequence,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                distributed_executor_backend="uni" if self._ranks == 1 else "mp",
                tensor_parallel_size=self._ranks,
                worker_extension_cls=RANK_EXTENSION if self._ranks > 1 else "",
                enforce_eager=self._cpu,
                # A step ahead of its outputs, it would sample tokens of which nobody could say by which weights.
                async_scheduling=False if spec.mid_sequence else None,
                # A prompt that is read in parts makes vLLM wind its sample's generator back, which a CPU's cannot do.
                enable_chunked_prefill=False if self._cpu else None,
                max_num_batched_tokens=max(TOKENS_PER_STEP, spec.max_sequence_tokens) if self._cpu else None,
                kv_cache_memory_bytes=int(spec.cache_gib * GIB / self._ranks) if self._cpu else None,
                gpu_memory_utilization=spec.gpu_memory_fraction,
                enable_sleep_mode=spec.sleeps,
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
        self._engine = self._llm.llm_engine
        if self._ranks > 1:
            self._ask_ranks("begin_rank", os.getpid())
        self._requests = 0
        self._salt = ""
        self._stamps: dict[str, list[int]] = {}  # the version of each token so far, by request
        self._unread: list[RequestOutput] = []  # what ended while the probe was waited for

    def close(self) -> None:
        """Ends the engine and its processes. vLLM takes this process's torch.distributed group down with it."""
        self._version = self._fingerprint = None
        if "_llm" not in self.__dict__:
            return
        self._engine.engine_core.shutdown()
        del self._llm, self._engine
        own = [c for c in psutil.Process().children(recursive=True) if c.pid not in self._children_before]
        for child in own:
            child.terminate()
        _, alive = psutil.wait_procs(own, timeout=REAP_TIMEOUT_S)
        for child in alive:
            child.kill()
        psutil.wait_procs(alive, timeout=REAP_TIMEOUT_S)

    def _give_up(self) -> None:
        """Level 2: weights are let go, not kept in the host's memory, because what wakes it is a `load`."""
        self._engine.sleep(level=2)

    def _make_room_for_weights(self) -> None:
        self._engine.wake_up(tags=["weights"])

    def _make_room_for_samples(self) -> None:
        """Second, so that the cache does not stand beside what loading needs. The probe is a request, and needs it."""
        self._engine.wake_up(tags=["kv_cache"])

    def _take(self, weights: Weights) -> None:
        if self._ranks > 1:
            with shared(weights) as tensors:
                self._ask_ranks("take_shared", tensors)
        else:
            runner = self._engine.model_executor.driver_worker.worker.model_runner
            own = ((name, tensor.unpack()) for name, tensor in weights.tensors.items())
            take(runner, own, on_cpu=self._cpu)
        # Blocks of samples in flight cannot be dropped: a new salt keeps later requests from reading them.
        self._salt = f"{weights.life}/{weights.version}"
        if not self._sampling and not self._engine.reset_prefix_cache():
            raise RunFailed(
                f"{self._spec.name}: vLLM would not drop its prefix cache, which holds values of the old weights"
            )

    def _ask_ranks(self, method: str, argument: Any) -> None:
        """Calls a method of `RankExtension` in every process of the engine, and waits for all of them."""
        with self._whole():
            self._engine.collective_rpc(method, args=(argument,), kwargs={"on_cpu": self._cpu})

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Raises EngineLost for whatever vLLM raises once one of its processes has died."""
        try:
            yield
        except Exception as error:
            if self._ranks > 1 and self._has_lost_a_rank():
                raise EngineLost(f"{self._spec.name}: one of its {self._ranks} processes has died") from error
            raise

    def _has_lost_a_rank(self) -> bool:
        """Also where another rank has complained before vLLM noticed the death."""
        executor = self._engine.model_executor
        return executor.is_failed or not all(worker.proc.is_alive() for worker in executor.workers)

    def _probe(self, token_ids: Ids) -> Floats:
        from vllm import SamplingParams

        # Prompt log-probs are computed only for tokens that are not taken from the prefix cache.
        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, skip_reading_prefix_cache=True
        )
        self._add("probe", token_ids, params)
        ended: list[RequestOutput] = []
        while not ended:
            for output in self._step():
                (ended if output.request_id == "probe" else self._unread).append(output)
        self._stamps.pop("probe")
        (output,) = ended
        tables = cast("list[dict[int, Logprob]]", output.prompt_logprobs)
        ids = token_ids.tolist()
        return np.array([tables[i][ids[i]].logprob for i in range(1, len(ids))], dtype=np.float32)

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int, purpose: str
    ) -> StepwiseGroups:
        asked = deque((prompt, index) for prompt in prompts for index in range(samples_per_prompt))
        waiting: dict[str, tuple[Prompt, int, int]] = {}
        finished: dict[int, list[Draw]] = {prompt.id: [] for prompt in prompts}
        try:
            while asked or waiting:
                # Not all at once: one that waits inside vLLM would be ahead of the probe of new weights.
                while asked and len(waiting) < self._spec.max_sequences:
                    prompt, index = asked.popleft()
                    seed = self._seed(purpose, prompt, index)
                    self._requests += 1
                    request = f"{prompt.id}/{index}/{self._requests}"
                    waiting[request] = (prompt, index, seed)
                    self._add(request, prompt.token_ids, self._params(sampling, seed))
                ended, self._unread = self._unread, []
                for output in ended or self._step():
                    prompt, index, seed = waiting.pop(output.request_id)
                    draws = finished[prompt.id]
                    draws.append(read_draw(output, index, seed, self._stamps.pop(output.request_id)))
                    if len(draws) == samples_per_prompt:
                        yield self._group(prompt, draws, sampling)
                yield None
        finally:
            self._unread, self._stamps = [], {}
            if waiting:
                self._engine.abort_request(list(waiting))

    def _params(self, sampling: Sampling, seed: int) -> "SamplingParams":
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            seed=seed,
            logprobs=0,
            stop_token_ids=sorted(self._stop_ids),
            detokenize=False,
        )

    def _add(self, request: str, token_ids: Ids, params: "SamplingParams") -> None:
        from vllm.inputs.engine import tokens_input

        self._stamps[request] = []
        self._engine.add_request(request, tokens_input(token_ids.tolist(), cache_salt=self._salt), params)

    def _step(self) -> list["RequestOutput"]:
        """One step of the engine; the final outputs of those that it ended. Raises RunFailed if there is no request."""
        if not self._engine.has_unfinished_requests():
            raise RunFailed(f"{self._spec.name}: vLLM has lost the requests {sorted(self._stamps)[:4]}")
        # vLLM compiles a counting helper at its first use, ten seconds of C++ on a CPU for no gain.
        with self._whole(), torch.compiler.set_stance("force_eager" if self._cpu else "default"):
            outputs = cast("list[RequestOutput]", self._engine.step())
        for output in outputs:
            stamps = self._stamps[output.request_id]
            stamps += [self._taken] * (len(output.outputs[0].token_ids) - len(stamps))
        return [output for output in outputs if output.finished]


def read_draw(output: "RequestOutput", index: int, seed: int, versions: Sequence[int]) -> Draw:
    """The completion of a finished request with the log-probability of each sampled token.

    vLLM's table of a position holds the sampled token and possibly others; it is read by the sampled id, never by
    place.
    """
    completion = output.outputs[0]
    ids = list(completion.token_ids)
    tables = cast("list[dict[int, Logprob]]", completion.logprobs)
    logprobs = [table[token].logprob for token, table in zip(ids, tables, strict=True)]
    return Draw(index, ids, logprobs, seed, versions)


@contextmanager
def thread_setting_kept() -> Iterator[None]:
    """Undoes what vLLM's CPU worker does to the whole process: `torch.set_num_threads` becomes a warning."""
    original: Any = torch.set_num_threads
    try:
        with silenced("vllm.v1.worker.cpu_worker", "CPU backend doesn't allow to use"):
            yield
    finally:
        torch.set_num_threads = original


@contextmanager
def threads_passed_on() -> Iterator[None]:
    """Has the processes that are started meanwhile compute with as many threads as this one. Where nothing says how
    many, vLLM would take all cores for each of them, and leave this process one."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
