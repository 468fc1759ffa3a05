"""A function of tensors becomes one flat graph of tensor operations, and that graph compiled code.

``torch.compile`` follows Python bytecode and loses itself in Pyro's handlers. Here the function runs once and
its tensor operations are written down as they happen (``make_fx``): what Python decided on the way, such as
shapes, names and numbers, is fixed in the graph. Whatever may change from call to call must therefore be an
argument; what a call decides by looking at a tensor's value cannot be captured and raises.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from scivi.errors import Unsupported

FILLS = {  # operations that fill a tensor with random numbers, and how they do so in place
    torch.ops.aten.normal_functional.default: torch.ops.aten.normal_.default,
    torch.ops.aten.uniform.default: torch.ops.aten.uniform_.default,
    torch.ops.aten.exponential.default: torch.ops.aten.exponential_.default,
    torch.ops.aten.cauchy.default: torch.ops.aten.cauchy_.default,
    torch.ops.aten.log_normal.default: torch.ops.aten.log_normal_.default,
    torch.ops.aten.geometric.default: torch.ops.aten.geometric_.default,
}
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
Function = Callable[..., Sequence[Tensor]]
WORTH_THREADS = 2**22  # of ``work_of``: a millisecond or more (our choice, measured)
ON_CPU: dict[str, Any] = {
    "cpp_wrapper": True,  # the calls between kernels in C++ too: most of a small model's time is there
    "cpp.min_chunk_size": 2**12,  # numbers in a loop that repay a second thread (our choice; default 512)
    "size_asserts": False,  # the arguments' form is checked before
    "alignment_asserts": False,
}


def captured(function: Function, examples: Sequence[Tensor], *, owned: Iterable[Tensor] = ()) -> GraphModule:
    """The tensor operations of one call, as a graph with the examples as inputs.

    Args:
        function: of tensors, to tensors.
        examples: its arguments; later ones must have the same shapes, dtypes and devices.
        owned: tensors that change between calls. If the function reaches one otherwise than by an argument,
            the graph would keep today's value, and is refused.

    Raises:
        Unsupported: the function looks at the value of a tensor to decide what to do, or reaches an owned
            tensor behind the back of its arguments.
    """
    distinct = _distinct(examples)
    try:
        # again, without changes in place: then equal operations on equal arguments give equal numbers
        graph = _traced(torch.func.functionalize(_traced(function, distinct)), distinct)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise Unsupported(f"it decides by the value of a tensor ({_first_line(error)})") from error
    behind = {_place(t) for t in owned if t.numel()}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            value = getattr(graph, str(node.target), None)
            if isinstance(value, Tensor) and _place(value) in behind:
                raise Unsupported("a parameter is used otherwise than through the template's nets")
        if node.target is torch.ops.aten.detach.default:  # nothing is differentiated any more
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    _merge_repeats(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def stacked(graph: GraphModule, shared: Sequence[bool]) -> Function:
    """The function of a captured graph for many sets of arguments at once, each with its own random numbers.

    Args:
        graph: of one set of arguments.
        shared: by argument, whether all sets have it in common; the others are stacked along a new first
            axis, as all results are. The first argument is stacked.

    Notes:
        ``vmap`` (torch 2.13) fills a tensor that is the same for all sets with the same random numbers for
        all, and one that is not set by set; both in the functional form that a captured graph has. So these
        operations are given a tensor that depends on the set, to be filled in place, which it does at once.
    """
    made = GraphModule(graph, deepcopy(graph.graph))
    own = next(iter(made.graph.nodes))
    for node in list(made.graph.nodes):
        if node.target is torch.ops.aten.slice_scatter.default:  # "to the end" overflows in vmap
            value, source, dim, start, end, *step = node.args
            node.args = (value, source, dim, start, min(end, value.meta["val"].shape[dim]), *step)
        if node.target not in FILLS:
            continue
        with made.graph.inserting_before(node):
            total = made.graph.call_function(torch.ops.aten.sum.default, (own,))
            given = node.args[0].meta["val"]
            knobs = {"dtype": given.dtype, "pin_memory": False}
            fresh = made.graph.call_function(torch.ops.aten.new_empty.default, (total, given.shape), knobs)
        node.target, node.args = FILLS[node.target], (fresh, *node.args[1:])
    made.recompile()
    return torch.func.vmap(made, tuple(None if one else 0 for one in shared), randomness="different")


def _traced(function: Function, examples: Sequence[Tensor]) -> GraphModule:
    """What the function does to the examples, by running it once."""
    with tracing(TracingContext(FakeTensorMode())):  # else torch makes one for each node: twice the time
        return make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*examples)


def _merge_repeats(graph: GraphModule) -> None:
    """Let what guide and model both work out be worked out once."""
    first: dict[tuple[object, str, str], Node] = {}
    for node in list(graph.graph.nodes):
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op != "call_function" or random:
            continue
        same = first.setdefault((node.target, str(node.args), str(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)


def _distinct(examples: Sequence[Tensor]) -> list[Tensor]:
    """The examples, none of which is another one: two that are the same tensor would become one input."""
    seen: set[tuple[int, ...]] = set()
    out = []
    for example in examples:
        place = _place(example)
        out.append(example.clone() if place in seen else example)
        seen.add(place)
    return out


def _place(tensor: Tensor) -> tuple[int, ...]:
    return (tensor.data_ptr(), *tensor.shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def compiled(graph: GraphModule, examples: Sequence[Tensor]) -> tuple[Function, str]:
    """The graph as machine code where there is a compiler, and how it now runs: "compiled" or "captured".

    Random numbers are torch's own, in the same order as in the graph. Code is kept on disk by torch and found
    again by the next process. A small graph runs on one thread: a second would be waited for more than it
    helps.
    """
    on_cpu = examples[0].device.type == "cpu"
    if on_cpu and not has_compiler():
        return graph, "captured"
    threads = 1 if on_cpu and work_of(graph) < WORTH_THREADS else torch.get_num_threads()
    with _threads(threads), _quiet_compiler():
        function = _inductor(graph, examples)
    if threads == torch.get_num_threads():
        return function, "compiled"

    def alone(*arguments: Tensor) -> Sequence[Tensor]:
        with _threads(threads):
            return function(*arguments)

    return alone, "compiled"


def first_of(graph: GraphModule) -> GraphModule:
    """The graph of the first result alone, as a tuple of one, without what only the others need."""
    made = GraphModule(graph, deepcopy(graph.graph))
    out = next(node for node in made.graph.nodes if node.op == "output")
    out.args = ((cast(Any, out.args[0])[0],),)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def largest_of(graph: GraphModule) -> int:
    """Entries of the largest tensor that a call of the graph makes."""
    values = (node.meta.get("val") for node in graph.graph.nodes)
    return max((value.numel() for value in values if isinstance(value, Tensor)), default=1)


def work_of(graph: GraphModule) -> int:
    """Numbers that a run of the graph writes, and an eighth of the multiplications of its matrix products."""
    work = 0
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        work += value.numel()
        if node.target in PRODUCTS:
            inner = node.args[-1].meta["val"].shape[-2]
            work += value.numel() * inner // 8
    return work


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run torch on so many threads, and give it back its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def has_compiler() -> bool:
    """Whether this machine can compile C++, as Inductor wants for a CPU."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Keep torch's remarks on its own code and choices from the user."""
    loggers = [logging.getLogger(n) for n in ("torch._inductor", "torch._functorch", "torch._dynamo")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _inductor(graph: GraphModule, examples: Sequence[Tensor]) -> Function:
    """Inductor without the tracing in front of it. Its entry is not yet public: only this line has it."""
    import torch._inductor.config as config
    from torch._inductor import standalone_compile
    from torch._inductor.exc import InductorError

    knobs = ON_CPU if examples[0].device.type == "cpu" else {}
    with config.patch({"fallback_random": True, **knobs}):  # random numbers as an eager run draws them
        try:
            return standalone_compile(graph, list(examples), dynamic_shapes="from_example_inputs")
        except InductorError as error:
            raise Unsupported(f"the compiler failed ({_first_line(error)})") from error
