"""``grow``: the whole compiler in one call."""

from __future__ import annotations

import dataclasses
import hashlib
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, overload

import torch
from torch import fx, nn
from torch.optim.swa_utils import AveragedModel

from fxgrow import kernels
from fxgrow.compile import compile_regions, package, renew
from fxgrow.devices import check_memory
from fxgrow.emit.blocks import block_regions, is_checkpointed
from fxgrow.emit.casts import refusal
from fxgrow.emit.module import regenerate
from fxgrow.errors import FxgrowError, SpecError, reworded
from fxgrow.ir.bits import checksum
from fxgrow.ir.dtensors import local_of
from fxgrow.ir.fsdp import reshard
from fxgrow.ir.modules import version_of
from fxgrow.ir.nodes import info_of
from fxgrow.ir.plain import as_plain, is_distributed
from fxgrow.ir.provenance import Cast, provenance_of, remember
from fxgrow.ir.replicas import around, check_replicas, holding, ignored_by, innermost, plainly
from fxgrow.ir.traced import Traced, program_of
from fxgrow.landing.apply import apply, constants_held
from fxgrow.landing.copies import grown_tensors
from fxgrow.landing.into import into
from fxgrow.landing.living import Living
from fxgrow.landing.recast import recast
from fxgrow.landing.solve import solve_constants
from fxgrow.limits import check_elements
from fxgrow.optim.carry import carry, carry_
from fxgrow.optim.newborn import Frozen, NewParameters, check_unfrozen, freeze
from fxgrow.optim.policies import check_optimizer, check_plan
from fxgrow.optim.rates import check_settled
from fxgrow.passes.constants import remaining
from fxgrow.passes.state import State, run_operation
from fxgrow.plan import GrowthPlan
from fxgrow.program import Program, capture
from fxgrow.ranks import ALONE, Group, agree, agree_by_name, answering, gathered, size, together
from fxgrow.sharded.applying import Applied, apply_shards
from fxgrow.sharded.sharding import Gathered, Sharding, group_around
from fxgrow.spec import GrowthSpec
from fxgrow.verify.execute import drops_out
from fxgrow.verify.receipt import Receipt
from fxgrow.verify.verification import verify, verify_streamed
from fxgrow.weights.materialise import check_finite, check_readable, materialise_all, materialise_tensor

Verify = Literal["auto", "float64", "native"]
Module = TypeVar("Module", bound=nn.Module)
Optimizers = TypeVar("Optimizers", bound=torch.optim.Optimizer | Sequence[torch.optim.Optimizer])

#: "auto" verifies in float64 up to this many parameters of the grown model, beyond that in the model's own dtype
AUTO_FLOAT64_PARAMETERS = 50_000_000


class Growth:
    """A finished growth.

    Attributes:
        module: the grown model, a GraphModule with the original's parameter names.
        plan: every decision that was made.
        receipt: what was measured.
        program: the grown graph and its names; ``program.axes`` has the new sizes.
        policy: of :meth:`carry_` and :meth:`carry` where they are given none.
        group: the ranks that grow the model together, see :mod:`fxgrow.ranks`.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        plan: GrowthPlan,
        receipt: Receipt,
        program: Program,
        source: nn.Module,
        before: Traced | None = None,
        held: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.module, self.plan, self.receipt, self.program = module, plan, receipt, program
        self.policy = "asymmetric"
        self.group: Group = ALONE
        self._handed: set[str] = set()
        self._before, self._held = before, held or {}
        # weak, so that a growth does not keep the small model alive
        self._source = [(n, weakref.ref(p)) for n, p in source.named_parameters(remove_duplicate=True)]
        self._versions = {n: version_of(local_of(t)) for n, t in (*source.named_parameters(), *source.named_buffers())}

    def source_names(self) -> dict[int, str]:
        """``id`` of each of the old model's living parameters to its name."""
        return {id(p): n for n, ref in self._source if (p := ref()) is not None}

    def carry(
        self, optimizer: torch.optim.Optimizer, policy: str | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        """A new optimizer of the same class over the grown parameters, with the old one's state carried over.

        See :func:`fxgrow.optim.carry` for the policies and options; the policy that ``grow`` was given, or
        ``asymmetric``, is the default.
        """
        self._check_unchanged()
        names, new = self.source_names(), self._new()
        made = carry(
            self.plan, names, new, optimizer, self.policy if policy is None else policy, handed=self._handed, **options
        )
        self._hand_over([made], new)
        return made

    def carry_(self, optimizer: Optimizers, policy: str | None = None, **options: Any) -> Optimizers:
        """Exchange an optimizer's parameters for the grown ones, in place, with state and waiting gradients.

        The object stays, with its groups (the same dicts), hyper-parameters, hooks and attributes, so that schedulers,
        gradient scalers and trainers that hold it go on. Works before or after :meth:`apply_`, and without it, for
        :attr:`module`.

        Args:
            optimizer: that trains the small model, or a list of all that do: then ``newcomers`` is one of them. Each
                keeps what it held; parameters that are not the model's are left alone.
            policy, options: see :func:`fxgrow.optim.carry`.

        Returns:
            What was passed.

        Raises:
            FxgrowError: a policy that does not fit, a second call, weights that have changed since the growth,
                parameters kept beside the groups (see :func:`fxgrow.optim.carry_`); every optimizer is as it was then,
                on all ranks.
        """
        several: list[Any] = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        policy = self.policy if policy is None else policy
        plain = {name: value for name, value in options.items() if isinstance(value, int | float)}
        agree("the optimizer's policy", (policy, plain), self.group)
        with together("carry_", self.group):
            self._check_unchanged()
            names, new = self.source_names(), self._new()
            options |= {"handed": self._handed, "settled": lambda: agree("carry_", "worked out", self.group)}
            carry_(self.plan, names, new, several, policy, **options)
        self._hand_over(several, new)
        return optimizer

    def _check_unchanged(self) -> None:
        """Whether the small model's weights are what they were: moments of a later step belong to other weights."""
        changed = self._changed((n, p) for n, ref in self._source if (p := ref()) is not None)
        if changed:
            raise FxgrowError(
                f"{changed} has changed since the model was grown (an optimizer's step?), and the grown weights do "
                "not know of it: carry the optimizer over right after the growth"
            )

    def _changed(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
        """The first of some of the small model's tensors that was written into since the growth; "" for none."""
        return next((n for n, t in tensors if self._versions.get(n, -1) not in (-1, version_of(local_of(t)))), "")

    def _new(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters(remove_duplicate=True))

    def _hand_over(self, optimizers: Sequence[torch.optim.Optimizer], new: Mapping[str, nn.Parameter]) -> None:
        """Waiting gradients are added once, though two optimizers may hold a parameter."""
        held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
        self._handed |= {n for n, p in new.items() if id(p) in held}

    def apply_(self, model: nn.Module) -> nn.Module:
        """Grow the model itself, in place: the user's own class, with its methods, config and hooks.

        Afterwards it holds the very parameters and buffers of ``growth.module``. The sizes that modules and configs
        keep are set, blocks are copied, and the model is traced again: its graph must be the grown one.

        Args:
            model: the one that was grown, as it was then; compiled or not, in ``DistributedDataParallel`` or not (which
                goes on with its options and hooks), in any mode.

        Returns:
            The model.

        Raises:
            GrowthRefused: the class cannot compute the grown function; the message names the numbers, their lines and
                what to change. The model is as it was.
            FxgrowError: it is another model, or its weights have changed since.
        """
        self._apply(model)
        return model

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """:meth:`apply_`, taken back if the block raises: for what has to succeed together with it, or not at all.

        ::

            with growth.applied(model):
                growth.carry_(optimizer)

        Args:
            model: as for :meth:`apply_`.

        Yields:
            The model.

        Raises:
            GrowthRefused, FxgrowError: as :meth:`apply_`.
        """
        living = self._apply(model)
        try:
            with together("what goes with the growth", self.group):
                yield model
        except BaseException:
            living.undo()
            renew(model)
            raise

    def _apply(self, model: nn.Module) -> Living:
        def land() -> Living:
            if self._before is None:
                raise FxgrowError("this growth was not made by fxgrow.grow, so that there is no model to apply it to")
            self._check_source(innermost(model))
            return apply(model, self.plan, self._before, self.program, self.program.tensors, self._held)

        living = self._landed(land)
        renew(model)
        return living

    def _landed(self, land: Callable[[], Living]) -> Living:
        """A model that was grown in place on all ranks; where one of them cannot, it is as it was on all."""
        living: Living | None = None
        try:
            with together("apply_", self.group):
                living = land()
        except BaseException:
            if living is not None:
                living.undo()
            raise
        return living

    def apply_to_copy_(self, copy: nn.Module) -> nn.Module:
        """Grow a copy of the model in place by the same plan: a moving average of its weights, a frozen teacher.

        Args:
            copy: of the class and sizes that the model had, with weights of its own; of an ``AveragedModel`` its
                ``module`` is grown, and the count of averages stays.

        Returns:
            What was passed.

        Raises:
            GrowthRefused: as :meth:`apply_`; the copy is as it was.
            FxgrowError: its tensors are not the model's by name, shape and dtype, or are the model's own; or the plan,
                which was proved for the model's weights, does not keep what the copy computes.
        """
        before = self._before
        if before is None:
            raise FxgrowError(
                "this growth was not made by fxgrow.grow, so that there is no model to compare copies with"
            )
        inner = innermost(copy.module if isinstance(copy, AveragedModel) else copy)
        names = self.source_names()
        shared = next((n for n, p in inner.named_parameters() if id(p) in names), "")
        if shared:
            raise FxgrowError(
                f"{shared} of this {type(inner).__name__} is the model's own parameter, and would be another one "
                "afterwards: apply_ grows the model itself, and a copy needs weights of its own (copy.deepcopy)"
            )
        tensors = grown_tensors(inner, self.plan, before, self.program)
        apply(inner, self.plan, before, self.program, tensors, self._held)
        renew(inner)
        return copy

    def _check_source(self, model: nn.Module) -> None:
        """Whether a model is the one that was grown, with the weights that it had."""
        own = dict(model.named_parameters(remove_duplicate=True))
        for name, ref in self._source:
            if own.get(name) is not ref():
                raise FxgrowError(
                    f"apply_ grows the model that was captured, and {name} of this {type(model).__name__} is another "
                    "tensor than that one's: grow this model"
                )
        changed = self._changed((*own.items(), *model.named_buffers()))
        if changed:
            raise FxgrowError(f"{changed} has changed since the model was grown: grow it again, then apply the growth")

    def into(self, target: nn.Module) -> nn.Module:
        """Put the growth into a larger instance of the model's class, which you built: in its config's sizes.

        It is traced once, and its graph must be the grown one, op by op and number by number. Then its modules hold the
        very parameters and buffers of ``growth.module``; its ties, ``requires_grad``, mode and hooks stay.

        Args:
            target: in any mode, compiled or not, with any weights; on meta, it need not have any.

        Returns:
            The target.

        Raises:
            GrowthRefused: it computes something else; the message names the numbers on both sides. It is as it was.
        """
        self.receipt.notes.extend(into(target, self.module, self.plan, self.program))
        return target

    @cached_property
    def new_parameters(self) -> NewParameters:
        """What is new: parameters of new blocks and layers, and the new entries of widened ones."""
        return NewParameters(self.plan, list(self.program.parameters))

    def freeze_old(self, model: nn.Module | None = None) -> Frozen:
        """Train only what is new, as LLaMA Pro does with its new blocks, until ``unfreeze()`` of the result.

        Holds for every optimizer, whatever its weight decay and momentum; see :class:`fxgrow.optim.newborn.Frozen`.

        Args:
            model: another module that holds the grown parameters under the same names, such as a deeper instance of
                your own class; None: :attr:`module`, and whatever shares its parameters.

        Raises:
            SpecError: nothing new would be trained, or the model is another one; nothing is changed then.
        """
        return freeze(self.new_parameters, self.module if model is None else model, "old")

    def freeze_new(self, model: nn.Module | None = None) -> Frozen:
        """Train only what is old; the counterpart of :meth:`freeze_old`."""
        return freeze(self.new_parameters, self.module if model is None else model, "new")

    @overload
    def compile(self, model: None = None, *, checkpoint: bool = False, **options: Any) -> fx.GraphModule: ...
    @overload
    def compile(self, model: Module, *, checkpoint: bool = False, **options: Any) -> Module: ...
    def compile(self, model: nn.Module | None = None, *, checkpoint: bool = False, **options: Any) -> nn.Module:
        """Compile the grown module block by block, in place: blocks that are alike are compiled once.

        Args:
            model: your own model, after :meth:`apply_` or :meth:`into`; None: :attr:`module`. A model that is compiled
                so stays compiled when it grows again in place: what a growth has changed is compiled at its next call.
            checkpoint: keep a block's inputs alone for its backward, and run it again there.
            options: for ``torch.compile``.

        Returns:
            The model; names and state dict are unchanged.
        """
        return compile_regions(self.module if model is None else model, checkpoint=checkpoint, **options)

    def package(self, path: str | Path, model: nn.Module | None = None, **options: Any) -> Path:
        """Compile the grown module ahead of time into a file that runs without Python (AOTInductor), in eval mode.

        ``torch._inductor.aoti_load_package(path)`` runs it, as does PyTorch's C++ library. It takes what the first call
        of the growth takes, in other sizes too where the model allows them; the weights are inside.

        Args:
            path: the file, ``*.pt2``.
            model: your own model, after :meth:`apply_` or :meth:`into`; None: :attr:`module`.
            options: Inductor's.

        Returns:
            The file.

        Raises:
            FxgrowError: the path has another suffix, or the module cannot be exported or compiled.
        """
        call = self.program.calls[0]
        return package(self.module if model is None else model, call.args, call.kwargs, Path(path), options)

    def __repr__(self) -> str:
        return f"Growth({self.receipt.summary()})"


class ShardedGrowth(Growth):
    """A growth of a model of which each rank holds shards: FSDP2, HSDP, tensor parallelism.

    It is carried out in place, shard by shard: :meth:`apply_` and :meth:`carry_`, on all ranks. No rank ever has a
    whole tensor, and so there is no :attr:`module`.

    Attributes:
        traffic: the bytes that ranks send each other for the parameters, worked out beforehand; each moment of an
            optimizer's needs as many again.
    """

    def __init__(
        self,
        plan: GrowthPlan,
        receipt: Receipt,
        program: Program,
        source: nn.Module,
        before: Traced,
        held: Mapping[str, tuple[str, str]],
        sharding: Sharding,
    ) -> None:
        super().__init__(None, plan, receipt, program, source, before, held)  # type: ignore[arg-type]
        self.sharding = sharding
        self.traffic = sharding.traffic(plan, before)
        self._grown: dict[str, weakref.ref[nn.Parameter]] | None = None

    @property
    def module(self) -> fx.GraphModule:
        """None.

        Raises:
            FxgrowError: always.
        """
        raise FxgrowError(
            "the model is sharded, so that no process holds a grown module of its own: growth.apply_(model) grows the "
            "model itself, each rank its shards"
        )

    @module.setter
    def module(self, module: fx.GraphModule) -> None:
        """There is none to be kept."""

    def _apply(self, model: nn.Module) -> Applied:  # type: ignore[override]
        inner, before = innermost(model), self._before
        assert before is not None
        with together("apply_", self.group):
            reshard(inner)  # a forward without a backward leaves gathered parameters
            self._check_source(inner)

        how = (before, self.program, self._held, self.sharding, self.traffic, self._landed)
        with answering(self.group):
            applied = apply_shards(inner, self.plan, *how)
        named = inner.named_parameters(remove_duplicate=False)
        self._grown = {self.program.aliases.get(n, n): weakref.ref(p) for n, p in named}
        renew(model)
        return applied

    def carry_(self, optimizer: Optimizers, policy: str | None = None, **options: Any) -> Optimizers:
        """See :meth:`Growth.carry_`: moments are shards as the parameters are, and grow as they do.

        After :meth:`apply_`, on all ranks.
        """
        several: list[Any] = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        with together("carry_", self.group):  # what can fail, before anything is sent
            self._new()
            old = [p for _, ref in self._source if (p := ref()) is not None]
            check_optimizer(several, policy or self.policy, ramp=options.get("ramp"), parameters=old)
            check_plan(self.plan, policy or self.policy, several, self.source_names())
        with answering(self.group):
            return super().carry_(optimizer, policy, **options)

    def apply_to_copy_(self, copy: nn.Module) -> nn.Module:
        """Not of a sharded model.

        Raises:
            FxgrowError: always.
        """
        raise FxgrowError(
            f"{type(copy).__name__} cannot be grown as a copy of a sharded model: grow it by itself, with fxgrow.grow "
            "and the same spec (the same seed gives the same noise), or start the average anew"
        )

    def _new(self) -> dict[str, nn.Parameter]:
        if self._grown is None:
            raise FxgrowError("the model is sharded: growth.apply_(model) first, then growth.carry_(optimizer)")
        return {n: p for n, ref in self._grown.items() if (p := ref()) is not None}


def plan_growth(program: Program, spec: GrowthSpec, like: Traced | None = None) -> tuple[GrowthPlan, Program]:
    """Decide a growth. Needs shapes only: works on meta tensors.

    Args:
        like: a larger instance's trace: constants that it has otherwise are folded into weights where that is exact.

    Returns:
        The plan, and the grown program: its graph and names, with shapes (meta tensors) in place of weights. It can be
        planned with again.

    Raises:
        SpecError: the spec names something the model does not have.
        GrowthRefused: a growth that cannot be proved exact.
    """
    state = State.start(program)
    plan = GrowthPlan(model=program.class_name)
    for number, operation in enumerate(spec.operations):
        try:
            plan.steps.extend(run_operation(state, operation))
            for name, tensor in state.tensors.items():
                check_elements(name, tensor.shape)
        except FxgrowError as error:
            if len(spec.operations) > 1:
                raise reworded(error, f"operations.{number} ({operation.op}): {error}") from error
            raise
    plan.tensors = state.tensors
    if like is not None:
        solve_constants(state, plan.steps, like, lambda: _grown_shapes(state.program, plan))
    for name, twin in program.twins.items():  # what no call reads grows as what stands in for it does
        if name in plan.tensors and twin in plan.tensors and plan.tensors[twin].source == twin:
            own = {"source": name, "requires_grad": plan.tensors[name].requires_grad}
            plan.tensors[name] = plan.tensors[twin].model_copy(update=own, deep=True)
    plan.aliases = dict(state.program.aliases)
    plan.constants = remaining(state)
    parameters = program.parameters
    plan.parameters_before = sum(p.numel() for p in parameters.values())
    plan.parameters_after = sum(
        int(torch.Size(t.shape).numel()) for n, t in state.tensors.items() if n in state.program.parameters
    )
    return plan, Program.of(_grown_shapes(state.program, plan))


def _let_cast(
    module: fx.GraphModule,
    model: nn.Module,
    before: Traced,
    grown: tuple[GrowthPlan, Traced],
    spec: GrowthSpec,
    like: Traced | None,
) -> None:
    """Let a grown module follow casts as the model does: what that computes in another dtype is grown once more."""
    plan, program = grown
    source = weakref.ref(model)  # a growth does not keep the small model alive

    def recast_program(casts: tuple[Cast, ...]) -> tuple[Traced, dict[str, torch.Tensor]] | None:
        living = source()
        if living is None:
            return None
        shapes = {n: p.shape for n, p in living.named_parameters()}
        if shapes == {n: p.shape for n, p in program.parameters.items()}:  # the growth was applied to it
            again = recast(living, program, casts)
            return again, again.constants
        if shapes != {n: p.shape for n, p in before.parameters.items()}:
            return None
        traced = recast(living, before, casts)
        other, result = plan_growth(traced, spec, like)
        mine, theirs = (p.model_dump(mode="json", include={"tensors"})["tensors"] for p in (plan, other))
        changed = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
        if changed:
            raise refusal(before.class_name, casts[-1], f"in that dtype its growth makes another {changed[0]}")
        return result, {n: materialise_tensor(other.tensors[n], traced.constants[n]) for n in traced.constants}

    found = provenance_of(module)
    assert found is not None
    remember(module, dataclasses.replace(found, recast=recast_program))


def _grown_shapes(program: Traced, plan: GrowthPlan) -> Traced:
    def shaped(table: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: torch.empty(plan.tensors[n].shape, dtype=t.dtype, device="meta") for n, t in table.items()}

    return dataclasses.replace(
        program,
        parameters=shaped(program.parameters),
        buffers=shaped(program.buffers),
        constants=shaped(program.constants),
    )


def grow(
    model: nn.Module | Program,
    spec: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calls: Mapping[str, Any] | None = None,
    verify: Verify | Literal[False] = "auto",
    consume: bool = False,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    policy: str = "asymmetric",
    ramp: int | None = None,
    program: Program | None = None,
    like: Traced | None = None,
) -> Growth:
    """Grow a model by a spec.

    Args:
        model: any module that ``torch.export`` can trace, or a :class:`~fxgrow.program.Program` of it. One that is in
            ``DistributedDataParallel`` grows on all its ranks alike, and one that is sharded (FSDP2, tensor parallel)
            shard by shard, see :class:`ShardedGrowth`; this is a collective operation then.
        spec: a dict, a list of operations, YAML or JSON text, a path, or a :class:`~fxgrow.spec.GrowthSpec`.
        args, kwargs: example inputs, at least two in every dynamic dim (batch, sequence).
        calls: further ways of calling the model, by name, see :func:`~fxgrow.program.capture`.
        verify: ``"float64"`` compares both models in float64 (a second, wider copy of both); ``"native"`` in the
            model's own dtype; ``"auto"`` chooses by size; False measures nothing, and the receipt says so.
        consume: free each old tensor as soon as its successors are made. The original model is destroyed, so nothing
            can be verified against it afterwards.
        optimizer: or several, that :meth:`Growth.carry_` is to carry over: what does not fit is refused before anything
            is computed, and a growth that the policy does not fit before weights are.
        policy, ramp: for the optimizer; ``policy`` is the default of :meth:`Growth.carry_` then.
        program: the model's trace, where it is at hand.
        like: the trace of a larger instance that the growth is for: its constants are solved for, see
            :func:`plan_growth`.

    Returns:
        The grown module, its plan and its receipt. Unless ``consume``, the original is never changed.

    Raises:
        CaptureError, SpecError, GrowthRefused: see there; nothing has been changed then.
        FxgrowError: an optimizer that cannot be carried over this growth.
        ExactnessError: an exact plan measured inexact.
        RankError: on all ranks, where they differ in what they would grow, or one of them cannot.
    """
    how: dict[str, Any] = {"calls": calls, "verify": verify, "consume": consume, "optimizer": optimizer}
    how |= {"policy": policy, "ramp": ramp, "program": program, "like": like}
    replicas = []
    if isinstance(model, nn.Module):
        model, replicas = innermost(model), around(model)
        reshard(model)
    elif isinstance(model, Program):
        replicas = holding(model.parameters.values())
    group = group_around(model, replicas)
    check_replicas(replicas)
    with together("the growth", group), plainly(model):
        growth = _grow(model, spec, args, kwargs, **how, group=group, ignored=ignored_by(replicas))
    growth.group = group
    return growth


def _grow(
    model: nn.Module | Program,
    spec: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    *,
    calls: Mapping[str, Any] | None,
    verify: Verify | Literal[False],
    consume: bool,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    policy: str,
    ramp: int | None,
    program: Program | None,
    like: Traced | None,
    group: Group = ALONE,
    ignored: Collection[int] = (),
) -> Growth:
    """See :func:`grow`.

    Args:
        group: ranks that have to plan the same for the same weights.
        ignored: ``id`` of tensors that may be others on every rank.
    """
    if optimizer is not None:
        parameters = model.parameters.values() if isinstance(model, Program) else model.parameters()
        check_optimizer(optimizer, policy, ramp=ramp, parameters=parameters)  # type: ignore[arg-type]
    seconds: dict[str, float] = {}
    parsed = GrowthSpec.parse(spec)
    agree("the spec", parsed.to_dict(), group)
    if verify is not False and verify not in get_args(Verify):
        raise SpecError(f"verify={verify!r} is none of {', '.join(map(repr, get_args(Verify)))} and False")
    if consume and verify not in (False, "auto"):
        raise SpecError("consume=True frees the original, so that there is nothing to verify against; use verify=False")
    if isinstance(model, nn.Module) and is_distributed(model):
        if consume or like is not None:
            raise FxgrowError(
                f"{'consume' if consume else 'like'} is not for sharded models: growth.apply_ frees shards"
            )
        how: dict[str, Any] = {"calls": calls, "verify": verify, "optimizer": optimizer, "policy": policy}
        return _grow_shards(model, parsed, args, kwargs, **how, program=program, group=group)
    with timed(seconds, "capture"):
        if program is None:
            program = model if isinstance(model, Program) else capture(model, args, kwargs, calls=calls)
    check_readable(program.tensors)
    check_settled(program.parameters.values())
    check_unfrozen(program.parameters)
    check_finite(program.tensors)
    with timed(seconds, "analyse and plan"):
        plan, grown_program = plan_growth(program, parsed, like)
    if optimizer is not None:
        check_plan(plan, policy, optimizer, {id(p): n for n, p in program.parameters.items()})
    check_memory(_needed(program, grown_program, plan))
    _check_alike(program, plan, group, ignored)
    held = constants_held(model, program) if isinstance(model, nn.Module) else {}
    module, _ = build(program, grown_program, plan, seconds, consume=consume)
    if isinstance(model, nn.Module):
        shapes = None if like is None else like.without_tensors()
        _let_cast(module, model, program.without_tensors(), (plan, grown_program), parsed, shapes)
    unmeasured = (
        "the model has no values (meta tensors)"
        if _on_meta(program)
        else "consume=True freed the original"
        if consume
        else "verification was switched off"
        if verify is False
        else ""
    )
    if unmeasured:
        receipt = Receipt(exactness=plan.exactness, notes=[f"not measured: {unmeasured}"])
    else:
        large = plan.parameters_after > AUTO_FLOAT64_PARAMETERS
        level = verify if verify and verify != "auto" else "streamed" if large else "float64"
        source = model if isinstance(model, nn.Module) else None
        receipt = _verify(program, grown_program, plan, source, module, level)
    receipt.params_before, receipt.params_after = plan.parameters_before, plan.parameters_after
    receipt.bytes_before = _bytes(program.parameters.values()) if not consume else 0
    receipt.bytes_after = _bytes(module.parameters())
    receipt.seconds = {**seconds, **receipt.seconds}
    receipt.constants = [str(c) for c in plan.constants]
    receipt.notes.extend(plan.notes)
    receipt.notes.extend(_caveats(program))
    source_module = model if isinstance(model, nn.Module) else _Names(program)
    grown = Program.of(program_of(module, grown_program))
    growth = Growth(module, plan, receipt, grown, source_module, program.without_tensors(), held)
    growth.policy = policy
    return growth


_verify = verify


def _check_alike(program: Program, plan: GrowthPlan, group: Group, ignored: Collection[int]) -> None:
    """Whether all ranks make the same growth of the same weights; buffers are every rank's own between two steps.

    Raises:
        RankError: they do not.
    """
    if size(group) == 1:
        return
    _agree_on(plan, group)
    own = {n: checksum(p) for n, p in program.parameters.items() if id(p) not in ignored and not p.is_meta}
    agree_by_name("the parameter", own, group)


def _agree_on(plan: GrowthPlan, group: Group) -> None:
    if size(group) > 1:
        agree("the plan", hashlib.blake2b(plan.to_json().encode(), digest_size=8).hexdigest(), group)


def _grow_shards(
    model: nn.Module,
    spec: GrowthSpec,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    *,
    calls: Mapping[str, Any] | None,
    verify: Verify | Literal[False],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    policy: str,
    program: Program | None,
    group: Group,
) -> ShardedGrowth:
    """:func:`_grow` of a sharded model: planned on every rank, and measured with one tensor gathered at a time."""
    seconds: dict[str, float] = {}
    sharding = Sharding.of(model)
    parameters = dict(model.named_parameters(remove_duplicate=True))
    with timed(seconds, "capture"):
        program = program or capture(model, args, kwargs, calls=calls)
    check_settled(parameters.values())
    check_unfrozen(parameters)
    check_finite(parameters)
    with timed(seconds, "analyse and plan"):
        plan, grown_program = plan_growth(program, spec)
    for tensor in plan.tensors.values():
        if tensor.init is not None:
            tensor.device = "cpu"  # shapes stood for what is beside it; a rank makes its shard where its others are
    sharding.check(plan, program)
    if optimizer is not None:
        check_plan(plan, policy, optimizer, {id(p): n for n, p in parameters.items()})
    with as_plain(model):
        held = constants_held(model, program)
    _agree_on(plan, group)
    if verify is False:
        receipt = Receipt(exactness=plan.exactness, notes=["not measured: verification was switched off"])
    else:
        # every rank asks for the same tensors in the same order: on the examples of the first
        examples = gathered([(c.args, c.kwargs) for c in program.calls], group)[0]
        same = [dataclasses.replace(c, args=a, kwargs=k) for c, (a, k) in zip(program.calls, examples, strict=True)]
        weights: Any = Gathered(parameters)
        own = dataclasses.replace(program, parameters=weights, calls=same)
        with answering(group):
            receipt = verify_streamed(own, grown_program, plan)
    receipt.params_before, receipt.params_after = plan.parameters_before, plan.parameters_after
    receipt.seconds = {**seconds, **receipt.seconds}
    receipt.constants = [str(c) for c in plan.constants]
    growth = ShardedGrowth(plan, receipt, grown_program, model, program, held, sharding)
    receipt.notes += [*plan.notes, *_caveats(program), growth.traffic.words]
    growth.policy = policy
    return growth


def _needed(program: Program, grown_program: Program, plan: GrowthPlan) -> dict[torch.device, int]:
    """Bytes of the grown model's tensors by device; those on meta need none."""
    needed: dict[torch.device, int] = {}
    default = next((t.device for t in program.tensors.values()), torch.device("cpu"))
    for name, tensor in grown_program.tensors.items():
        source = plan.tensors[name].source
        device = default if source is None else program.tensor(source).device
        if device.type != "meta":
            needed[device] = needed.get(device, 0) + tensor.numel() * tensor.element_size()
    return needed


class _Names(nn.Module):
    """Stands for a module where only a program is known: the names of its parameters."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._named = program.parameters

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._named.items())  # type: ignore[arg-type]


def build(
    program: Program, grown_program: Program, plan: GrowthPlan, seconds: dict[str, float], *, consume: bool = False
) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    """Materialise a plan's tensors and regenerate the module."""

    def free(name: str) -> None:
        kernels.release(program.tensor(name))

    with timed(seconds, "materialise"):
        tensors = dict(materialise_all(plan, program.tensor, done=free if consume else None))
    with timed(seconds, "regenerate"):
        module = regenerate(grown_program, tensors)
    return module, tensors


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of a block to those of a part."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _on_meta(program: Program) -> bool:
    return any(t.device.type == "meta" for t in program.parameters.values())


def _caveats(program: Program) -> list[str]:
    """What exactness does not cover."""
    notes = []
    if any(drops_out(n) for n in program.graph.nodes):
        notes.append(
            "with dropout active, the grown model's outputs are not distributed like the small one's: every copy has a "
            "mask of its own, so that what is read through them varies less, and behind anything that is not linear "
            "the mean moves, too"
        )
    again = {n for r in block_regions(program, program.graph) if is_checkpointed(r) for n in r.nodes}
    ops = [n for n in program.graph.nodes if n.op == "call_function" and not info_of(n).is_flag]
    if any(info_of(n).checkpointed and n not in again for n in ops):
        notes.append(
            "activation checkpointing is traced away where it covers less than a block of a stack, or the block writes "
            "into its state: there the grown module keeps every activation for its backward; apply "
            "torch.utils.checkpoint to it again"
        )
    return notes
