"""The degrees of parallelism of a run. Imports neither torch nor megatron."""

from dataclasses import dataclass

from engine.errors import UserError
from engine.settings.checks import check_numbers
from models.sizes import VOCAB_GROUP, GPTSize


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The degrees of parallelism of a run; data parallelism takes the ranks that tp, pp and cp
    leave."""

    tp: int = 1
    """Tensor parallel: ranks that share every matrix of a layer (and the vocabulary)."""
    pp: int = 1
    """Pipeline parallel: stages that the layers are dealt to."""
    virtual_pp: int = 1
    """Model chunks a stage holds for the interleaved schedule; 1 is plain 1F1B."""
    cp: int = 1
    """Context parallel: ranks that share the tokens of a row, for contexts that one rank's memory
    cannot hold; in rollouts they generate as more data-parallel ranks would."""
    sequence_parallel: bool = False
    """Split the activations between tensor parallel regions along the tokens (needs tp > 1)."""
    overlap_grad_reduce: bool | None = None
    """Sum gradients over data-parallel ranks while the backward pass goes on; none: on GPUs where
    dp > 1. Changes speed, nothing else."""
    overlap_param_gather: bool | None = None
    """Gather the weights that data-parallel ranks have updated while the next forward pass starts;
    none: where the gradients' sum overlaps, on GPUs. It needs that, which cuts the buffers into the
    buckets that are gathered one by one. Changes speed, nothing else."""
    bucket_elements: int | None = None
    """Elements of a bucket of gradients and weights that one message carries, where they overlap;
    none: megatron's 40 M, or 1 M a data-parallel rank where that is more. Changes speed and
    padding, nothing else."""

    def overlaps(self, *, gains: bool) -> tuple[bool, bool]:
        """Return whether the sum of gradients and the gathering of weights overlap, where `gains`
        says that overlap is worth its while."""
        reduce, gather = self.overlap_grad_reduce, self.overlap_param_gather
        if reduce is None:
            reduce = gains or bool(gather)
        return reduce, gains and reduce if gather is None else gather

    @property
    def num_model_ranks(self) -> int:
        """Ranks that hold a model together: tp x pp x cp; raises UserError for a bad degree."""
        self._check_degrees()
        return self.tp * self.pp * self.cp

    def dp(self, world_size: int) -> int:
        """Return the data-parallel degree that world_size ranks leave, or raise UserError."""
        if world_size % self.num_model_ranks:
            raise UserError(
                f"{world_size} ranks cannot be split: layout tp {self.tp} x pp {self.pp} "
                f"x cp {self.cp} = {self.num_model_ranks} must divide them; change the layout or "
                "the launch"
            )
        return world_size // self.num_model_ranks

    def described(self, dp: int) -> str:
        """Return the degrees in words, dp among them; cp where there is context parallelism."""
        shared = f" x cp {self.cp}" if self.cp > 1 else ""
        return f"tp {self.tp} x pp {self.pp} x dp {dp}{shared}"

    def check(self, size: GPTSize) -> None:
        """Raise UserError where this layout cannot hold a model of that size."""
        self._check_degrees()
        if size.num_heads % self.tp:
            raise UserError(f"--layout.tp {self.tp} must divide the model's {size.num_heads} heads")
        if size.num_kv_heads % self.tp:
            raise UserError(
                f"--layout.tp {self.tp} must divide the {size.num_kv_heads} heads of keys and "
                "values, which are not copied; take a smaller tp, and pp"
            )
        if size.ffn_size % self.tp:
            raise UserError(
                f"--layout.tp {self.tp} must divide the {size.ffn_size} columns of the model's MLP"
            )
        if size.padded_vocab_size % self.tp:
            raise UserError(
                f"--layout.tp {self.tp} must divide the padded vocabulary {size.padded_vocab_size}"
            )
        if size.padded_vocab_size // self.tp % VOCAB_GROUP:
            raise UserError(
                f"--layout.tp {self.tp} cuts the padded vocabulary {size.padded_vocab_size} into "
                f"shards that are no multiples of {VOCAB_GROUP}, which sampling draws together"
            )
        chunks = self.pp * self.virtual_pp
        if size.num_layers % chunks:
            raise UserError(
                f"--layout.pp {self.pp} x --layout.virtual-pp {self.virtual_pp} must divide the "
                f"{size.num_layers} layers"
            )

    def check_refit(self, target: "ParallelLayout") -> None:
        """Raise UserError where weights in this layout cannot be copied into `target`, to generate
        there (engine/residency/refit.py)."""
        if self.cp > 1 or target.cp > 1:
            raise UserError(
                f"weights are copied between layouts without context parallelism, not from cp "
                f"{self.cp} to cp {target.cp}"
            )
        if target.pp > 1:
            raise UserError(
                f"weights are copied to a layout without pipeline, not to pp {target.pp}"
            )
        if (self.tp, self.pp) == (target.tp, target.pp):
            raise UserError(
                f"tp {target.tp} x pp {target.pp} is the layout that the weights are in: a copy "
                "would gain nothing"
            )

    def _check_degrees(self) -> None:
        check_numbers(self, "layout.", counts="tp pp virtual_pp cp bucket_elements")
        if self.virtual_pp > 1 and self.pp == 1:
            raise UserError("--layout.virtual-pp needs --layout.pp > 1")
        if self.sequence_parallel and self.tp == 1:
            raise UserError("--layout.sequence-parallel needs --layout.tp > 1")
        if self.overlap_param_gather and self.overlap_grad_reduce is False:
            raise UserError("--layout.overlap-param-gather needs --layout.overlap-grad-reduce")
