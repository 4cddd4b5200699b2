"""The rules that every cascade keeps. A broken one raises IRError with a sentence that names it."""

from __future__ import annotations

from ....errors import IRError
from .cascade import Cascade, Statement
from .expr import Expr, Index, Pos, Ref, Size, Virtual, ranks_of, walk
from .printer import print_statement


def verify(cascade: Cascade) -> None:
    """Raises IRError, naming the statement, where a rule is broken.

    Names are declared before use and once (an iterative result is written at a fixed coordinate and at
    the next one); every read has as many coordinates as the tensor has ranks, and along these;
    a statement's ranks are those of its expression less those it reduces.
    """
    for tensor in cascade.inputs.values():
        for rank in tensor.ranks:
            _known(cascade, rank, f"input {tensor.name}")
        if len(set(tensor.ranks)) != len(tensor.ranks):
            raise IRError(f"input {tensor.name} has the same rank twice")
    written: dict[str, Statement] = {}
    for name in [*cascade.inputs, *(item.name for item in cascade.statements)]:
        if "." in name:
            raise IRError(f"{name}: names with a dot are for what plans add")
    for item in cascade.statements:
        _check_statement(cascade, item, written)
        written[item.name] = item
    for name in cascade.outputs:
        if name not in written and name not in cascade.inputs:
            raise IRError(f"output {name} is computed by no statement")


def _check_statement(cascade: Cascade, item: Statement, written: dict[str, Statement]) -> None:
    where = f"`{print_statement(item)}`"
    for index in item.indices:
        if index.rank:
            _known(cascade, index.rank, where)
    iterative = [i for i in item.indices if i.end or not i.rank or cascade.ranks[i.rank].iterative]
    if item.name in cascade.inputs or (item.name in written and not iterative):
        raise IRError(f"{where} writes {item.name} a second time")
    for index in item.indices:
        _check_written(cascade, index, where)
    inside = _check_expr(cascade, item.expr, written, where, item.name)
    for rank in item.over:
        _known(cascade, rank, where)
        if rank in item.ranks:
            raise IRError(f"{where} reduces over {rank} and keeps it")
    if (item.op is None) != (not item.over):
        raise IRError(f"{where} must name both a reduction and its ranks, or neither")
    free = inside - set(item.ranks) - set(item.over)
    if free:
        raise IRError(f"{where} leaves {', '.join(sorted(free))} neither kept nor reduced")
    if len(set(item.ranks)) != len(item.ranks):
        raise IRError(f"{where} has the same rank twice in its result")


def _check_written(cascade: Cascade, index: Index, where: str) -> None:
    if index.end:
        raise IRError(f"{where} writes the end of {index.rank}, which its last step writes")
    if index.rank and index.offset and not cascade.ranks[index.rank].iterative:
        raise IRError(f"{where} writes {index}, but {index.rank} is not iterative")


def _check_expr(
    cascade: Cascade, expr: Expr, written: dict[str, Statement], where: str, own: str
) -> frozenset[str]:
    for part in walk(expr):
        if isinstance(part, (Pos, Size, Virtual)):
            _known(cascade, part.rank, where)
            if isinstance(part, Virtual) and part.number >= cascade.ranks[part.rank].virtual:
                raise IRError(f"{where} asks for virtual coordinate {part.number} of {part.rank}")
        if isinstance(part, Ref):
            _check_read(cascade, part, written, where, own)
    return ranks_of(expr)


def _check_read(
    cascade: Cascade, read: Ref, written: dict[str, Statement], where: str, own: str
) -> None:
    if read.tensor in cascade.inputs:
        declared = tuple(Index(rank) for rank in cascade.inputs[read.tensor].ranks)
    elif read.tensor in written:
        declared = written[read.tensor].indices
    else:
        raise IRError(f"{where} reads {read.tensor} before it is computed")
    if len(declared) != len(read.indices):
        raise IRError(
            f"{where} reads {read.tensor} at {len(read.indices)} coordinates; it has {len(declared)}"
        )
    for index, own_index in zip(read.indices, declared, strict=True):
        if index.rank:
            _known(cascade, index.rank, where)
        iterative = index.end or not index.rank or not own_index.rank
        if not iterative and index.rank != own_index.rank:
            raise IRError(
                f"{where} reads {read.tensor} along {index.rank}, but it was made along "
                f"{own_index.rank}; declare it a second time along {index.rank}"
            )
        if iterative and own_index.rank and not cascade.ranks[own_index.rank].iterative:
            raise IRError(
                f"{where} reads one coordinate of {own_index.rank}, not an iterative rank"
            )


def _known(cascade: Cascade, rank: str, where: str) -> None:
    if rank not in cascade.ranks:
        raise IRError(f"{where} uses rank {rank!r}, which is not declared")
