"""megatron's distributed Adam over a network: fp32 masters, loss scaling, clipping, steps that are
skipped, and the learning-rate schedule."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from engine.settings.adam import AdamConfig
from engine.settings.spikes import SpikeConfig
from engine.training.diagnosis import check_of, diagnose
from engine.training.gradients import scale_gradients, sum_of_squares
from engine.training.network import Network
from engine.training.passes import finish_gradients
from engine.training.reduce import StepMetrics, reduce_metrics
from engine.training.skipped import SkippedSteps
from engine.training.spikes import SpikeWatch, losses_of
from engine.training.trainable import make_trainable

Owned = tuple[torch.nn.Parameter, slice, torch.Tensor]
"""(parameter, range of its flattened elements, what this rank keeps in fp32 for that range)."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did."""

    grad_norm: float
    """Global gradient norm before clipping; inf or nan where a gradient or loss was not finite."""
    lr: float
    """Learning rate of the step."""
    was_skipped: bool
    """True when the norm was not finite or a spike, and everything stayed as it was."""


class Optimizer:
    """The optimizer of one network; where in the schedule a step lies is the caller's to say."""

    def __init__(
        self,
        network: Network,
        config: AdamConfig,
        *,
        total_steps: int,
        spikes: SpikeConfig | None = None,
    ) -> None:
        self.network = network
        self.config = config
        make_trainable(network)
        network.settle()  # all ranks hold the same: the first pass has nothing to wait for
        self.megatron = _distributed_adam(network, config)
        self.skipped = SkippedSteps(limit=config.max_skipped_steps)
        self.loss_scale = 1.0  # of the last step; other than 1 in fp16 alone
        self.spikes = SpikeWatch(spikes or SpikeConfig())
        self._use_fused_kernel()
        self._is_counted = self._counted_masters()
        self._await_state: Callable[[], None] = _at_hand
        network.scale_losses(self.megatron.scale_loss if self.is_scaled else None)
        is_cosine = config.schedule == "cosine"
        self.schedule = OptimizerParamScheduler(
            self.megatron,
            init_lr=config.warmup_start * config.lr if config.warmup else 0.0,
            max_lr=config.lr,
            min_lr=config.final_fraction * config.lr if is_cosine else 0.0,
            lr_warmup_steps=config.warmup,
            lr_decay_steps=max(total_steps, config.warmup + 1),
            lr_decay_style=config.schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )

    def await_state_by(self, wait: Callable[[], None]) -> None:
        """Call `wait` before masters and moments are read: they may be elsewhere."""
        self._await_state = wait

    def zero_gradients(self) -> None:
        """Clear the gradient buffers before the first backward pass of a step."""
        for chunk in self.network.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, position: int, metrics: StepMetrics | None = None) -> StepResult:
        """Reduce the gradients, clip and apply them with the learning rate of schedule position
        `position` (from 0); or skip the step, on all ranks alike, where their norm is not finite,
        or a loss among this rank's `metrics` of the step; or where one of these is a spike.

        A skipped step changes nothing but fp16's loss scale; its position is not taken again.
        """
        finish_gradients(self.network)
        self._await_state()
        self.schedule.num_steps = position
        self.schedule.step(0)  # writes the learning rate of num_steps into the parameter groups
        with self.network.parallel.active():
            norm, loss_scale = self._read_norm(metrics or {})
            self.loss_scale = loss_scale
            is_finite = math.isfinite(norm)
            is_spike = is_finite and self._sees_spike(norm, metrics)
            for optimizer in self._distributed():
                if optimizer.grad_scaler is not None:
                    optimizer.grad_scaler.update(not is_finite)
            if is_finite and not is_spike:
                clip = min(1.0, self.config.clip_norm / (norm + 1e-6))
                scale_gradients(self._gradients(), clip / loss_scale)
                self.megatron.step_with_ready_grads()
                self.network.mark_changed()
            found = None if is_finite else diagnose(self.network, metrics or {})
        # A smaller loss scale mends gradients, which it scales, but no loss.
        can_fall = self.is_scaled and loss_scale > self.config.min_loss_scale
        self.skipped.count(
            was_skipped=not is_finite,
            is_explained=can_fall and found is not None and not found.losses,
            reason="" if found is None else str(found),
        )
        lr = self.megatron.param_groups[0]["lr"]
        return StepResult(grad_norm=norm, lr=lr, was_skipped=is_spike or not is_finite)

    @property
    def is_scaled(self) -> bool:
        """Whether losses are scaled before the backward pass, so that gradients survive fp16."""
        return self.network.dtype is torch.float16

    def numbers(self, result: StepResult) -> dict[str, float]:
        """Return what a step says of itself, as metrics; of loss scale and spikes where there are
        such."""
        values = {
            "grad_norm": result.grad_norm,
            "skipped_steps": float(self.skipped.total),
            "lr": result.lr,
        }
        if self.is_scaled:
            values["loss_scale"] = self.loss_scale
            values["scale_search_steps"] = float(self.skipped.num_searching)
        if self.spikes.config.policy != "none":
            values["spiked_steps"] = float(self.spikes.spiked.total)
        return values

    def sync_weights(self) -> None:
        """Make the network's weights follow the fp32 masters, after something other than step()
        changed those."""
        for optimizer in self._distributed():
            optimizer._copy_main_params_to_model_params()
        for chunk in self.network.chunks:
            chunk.start_param_sync(force_sync=True)
        self.network.mark_changed()

    def adopt_weights(self, only: Sequence[torch.nn.Parameter] | None = None) -> None:
        """Make the fp32 masters follow the network's weights, after those were loaded from a
        checkpoint; or those of some parameters alone, after these were changed: 16-bit weights have
        less than their masters do."""
        self.network.settle()
        chosen = None if only is None else {id(parameter) for parameter in only}
        for parameter, bounds, master in self.owned_masters():
            if chosen is None or id(parameter) in chosen:
                master.detach().copy_(parameter.detach().view(-1)[bounds])

    def owned_masters(self) -> list[Owned]:
        """Return the fp32 masters of this rank's shards."""
        owned = []
        for optimizer in self._distributed():
            pairs = (
                (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
                (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            )
            for parameter_groups, master_groups in pairs:
                for parameters, masters in zip(parameter_groups, master_groups, strict=True):
                    for parameter, master in zip(parameters, masters, strict=True):
                        bounds = optimizer._get_model_param_range_map(parameter)["param"]
                        owned.append((parameter, slice(bounds.start, bounds.end), master))
        return owned

    def num_owned_by_rank(self) -> list[int]:
        """Return, for the rank in this one's place in each replica, the elements whose fp32 masters
        and moments it keeps."""
        num_replicas = self.network.parallel.num_replicas
        num_owned = [0] * num_replicas
        for buffer in (b for chunk in self.network.chunks for b in chunk.buffers):
            for start, end, bucket_id in buffer.param_index_map.values():
                bucket = buffer.buckets[bucket_id]
                share = bucket.grad_data.numel() // num_replicas  # a rank's range of the bucket
                for rank in range(num_replicas):
                    first = bucket.offset + rank * share
                    num_owned[rank] += max(0, min(end, first + share) - max(start, first))
        return num_owned

    def owned_state(self) -> dict[str, list[Owned]]:
        """Return the fp32 masters and Adam's moments of this rank's shards, by megatron's names for
        them."""
        self.prepare_state()
        adam = {}
        for optimizer in self._distributed():
            adam.update(optimizer.optimizer.state)
        owned = self.owned_masters()
        moments = {
            name: [(parameter, bounds, adam[master][name]) for parameter, bounds, master in owned]
            for name in ("exp_avg", "exp_avg_sq")
        }
        return {"param": owned, **moments}

    def state_tensors(self) -> list[torch.Tensor]:
        """Return the fp32 masters, which are views of the weights where those are fp32, and Adam's
        moments."""
        moments = [
            state[name]
            for optimizer in self._distributed()
            for state in optimizer.optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        ]
        return [master for _, _, master in self.owned_masters()] + moments

    def prepare_state(self) -> None:
        """Allocate Adam's moments as zeros where no step has done so yet; checkpoints need them to
        exist."""
        self._await_state()
        for optimizer in self._distributed():
            if optimizer.optimizer.state:
                continue
            for param_group in optimizer.optimizer.param_groups:
                for master in param_group["params"]:
                    optimizer.optimizer.state[master] = {
                        "step": torch.zeros((), device=master.device),
                        "exp_avg": torch.zeros_like(master),
                        "exp_avg_sq": torch.zeros_like(master),
                    }

    def counts(self) -> dict[str, Any]:
        """Return the rest of a checkpoint's state, as JSON has it: Adam's count of steps, fp16's
        loss scale, skipped steps and spikes. The first rank writes it for all."""
        self.prepare_state()
        found: dict[str, Any] = {"skipped": self.skipped.state_dict()}
        if self.spikes.config.policy != "none":
            found["spikes"] = self.spikes.state_dict()
        for optimizer in self._distributed():
            steps = {float(s["step"]) for s in optimizer.optimizer.state.values()}
            if steps:  # none where this rank owns nothing but padding
                (found["step"],) = steps
            if optimizer.grad_scaler is not None:
                scaler = optimizer.grad_scaler.state_dict()
                found["grad_scaler"] = {**scaler, "scale": scaler["scale"].item()}
        return found

    def load_counts(self, counts: dict[str, Any]) -> None:
        """Take the rest of a checkpoint's state, whose masters and moments are in place; raises
        KeyError, TypeError or ValueError for what counts() does not return."""
        self.skipped.load_state_dict(counts["skipped"])
        self.spikes.load_state_dict(counts.get("spikes", {}))
        self.prepare_state()
        for optimizer in self._distributed():
            for master, adam_state in optimizer.optimizer.state.items():
                # A tensor each: Adam counts it up in place.
                adam_state["step"] = torch.tensor(float(counts["step"]), device=master.device)
            for param_group in optimizer.optimizer.param_groups:
                if "step" in param_group:  # apex's and Transformer Engine's Adam count there
                    param_group["step"] = int(counts["step"])
            if optimizer.grad_scaler is not None:
                scaler = counts["grad_scaler"]
                scale = torch.tensor([float(scaler["scale"])], device=self.network.parallel.device)
                optimizer.grad_scaler.load_state_dict({**scaler, "scale": scale})

    def _read_norm(self, metrics: StepMetrics) -> tuple[float, float]:
        """Return (norm of the gradients of all ranks, loss scale that they carry), the norm not
        finite where a loss is not: the host waits for the device here, once a step."""
        for optimizer in self._distributed():
            optimizer._copy_model_grads_to_main_grads()
        total = sum_of_squares(self._gradients(), self._is_counted)
        total = total + check_of(metrics, total)
        dist.all_reduce(total, group=self.megatron.get_grad_stats_parallel_group())
        numbers = torch.cat([total.sqrt(), self.megatron.get_loss_scale()])
        norm, loss_scale = numbers.tolist()  # sync: the only one
        return norm / loss_scale, loss_scale

    def _sees_spike(self, norm: float, metrics: StepMetrics | None) -> bool:
        losses: dict[str, float] = {}
        if self.spikes.reads_losses and metrics is not None:
            losses = losses_of(reduce_metrics(metrics, self.network.parallel))
        return self.spikes.sees_spike(norm, losses)

    def _masters(self) -> list[torch.Tensor]:
        return [
            master
            for optimizer in self._distributed()
            for param_group in optimizer.optimizer.param_groups
            for master in param_group["params"]
        ]

    def _gradients(self) -> list[torch.Tensor]:
        return [master.grad for master in self._masters()]  # type: ignore[misc]

    def _counted_masters(self) -> torch.Tensor:
        """Return 1 for each of _masters() whose gradient counts in the norm, 0 for copies: of what
        tensor-parallel ranks hold alike, of the embedding at the other end of a pipeline."""
        with self.network.parallel.active():
            counted = [
                float(param_is_not_shared(m) and param_is_not_tensor_parallel_duplicate(m))
                for m in self._masters()
            ]
        return torch.tensor(counted, device=self.network.parallel.device)

    def _use_fused_kernel(self) -> None:
        """Have torch's Adam update everything in one pass over memory; its count of steps then lies
        on the device. apex's and Transformer Engine's Adam do so by themselves."""
        for optimizer in self._distributed():
            if isinstance(optimizer.optimizer, torch.optim.AdamW):
                for param_group in optimizer.optimizer.param_groups:
                    param_group["fused"] = True

    def _distributed(self) -> list:
        return getattr(self.megatron, "chained_optimizers", [self.megatron])


def _at_hand() -> None:
    """Wait for an optimizer's state where nothing moves it (engine/residency does)."""


def _distributed_adam(network: Network, config: AdamConfig) -> Any:
    """Return megatron's distributed optimizer of a trainable network."""
    megatron_config = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.final_fraction * config.lr,
        weight_decay=config.weight_decay,
        fp16=network.dtype is torch.float16,
        bf16=network.dtype is torch.bfloat16,
        params_dtype=network.dtype,
        initial_loss_scale=max(2.0**16, config.min_loss_scale),
        min_loss_scale=config.min_loss_scale,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_norm,
        use_distributed_optimizer=True,
    )
    with network.parallel.active():
        return get_megatron_optimizer(
            megatron_config, network.chunks, use_gloo_process_groups=False
        )
