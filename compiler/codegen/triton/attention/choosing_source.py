"""Source of the kernels by which a query chooses pages (`ir/kv/read/pages`): statistics, products, order.

    bounds[b, k, p]   = statistic of the keys of page p             (`choosing_statistics.py`)
    upper[b, k, g, p] = parts of q . bounds
    share[b, k, g, p] = upper - log(sum over p of exp(upper))
    order[b, k, p]    = max over g of share; the first page and the newest come before all others

refresh  the statistics of the pages that new tokens came into, found anew from their slots
upper    the products, and of each tile of pages its largest one and the sum of its powers
order    whole numbers that sort as shares do, of equal ones the older page first; how many are read; where a
         reader wants those whose keys are most apart, numbers that sort as the last of a statistic does

Numbers. Products and shares are float32, whatever the slots are: one token reads each bound once, and so
many operations are little beside that. A share in the high 32 bits of a number and the page's place from the
end in the low ones make all numbers of a row different, so that any way to take the largest takes the same.
The count of pages is made in float64, as `Paged.pages` makes it.
"""

from __future__ import annotations

from textwrap import indent

from .choosing_kinds import ChoosingKind
from .choosing_statistics import statistic_text

#: A page's place from the end is told from here; its bits are the low half of what `order` gives.
LAST = 2**31 - 1

_TEXT = '''
@triton.jit(do_not_specialize=["new", "slots", "pages"])
def refresh(
    keys, used, bounds, new, slots, pages, keys_b, keys_k, keys_c, bounds_b, bounds_k, bounds_p,
    SLOTS: tl.constexpr,
):
    """The statistics of the pages from that of slot used[b] on, a page a program, SLOTS slots at a time.
    Slots behind the newest count as that."""
    b, k = tl.program_id(1).to(tl.int64) // {kv_heads}, tl.program_id(1).to(tl.int64) % {kv_heads}
    before = tl.load(used + b)
    page = before // {page} + tl.program_id(0)
    d = tl.arange(0, {lanes})
    live = d < {size}
    {begun}
    last = tl.minimum(before + new, slots) - 1
    start = keys + b * keys_b + k * keys_k + d[None, :]
    for first in range(0, {page}, SLOTS):
        slot = tl.minimum(page * {page} + first + tl.arange(0, SLOTS), last).to(tl.int64)
        key = tl.load(start + slot[:, None] * keys_c, mask=live[None, :], other=0).to(tl.float32)
        {taken}
    to = bounds + b * bounds_b + k * bounds_k + page.to(tl.int64) * bounds_p + d
    if page < pages:
        {stored}


@triton.jit(do_not_specialize=["pages"])
def upper(
    query, {given}bounds, used, uppers, tops, totals, pages, bounds_b, bounds_k, bounds_p,
    PAGES: tl.constexpr,
):
    """query [B, K, G, D] -> uppers [B, K, G, pages], -inf where no token is, tops and totals [B, K, G,
    tiles]; PAGES pages a program, of one KV head."""
    row = tl.program_id(1).to(tl.int64)
    b, k = row // {kv_heads}, row % {kv_heads}
    p = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    d = tl.arange(0, {lanes})
    seen = (tl.load(used + b) + {page}) // {page}
    live = (p < seen) & (p < pages)
    there = live[:, None] & (d < {size})[None, :]
    start = bounds + b * bounds_b + k * bounds_k + p.to(tl.int64)[:, None] * bounds_p + d[None, :]
    {loaded}
    {scales}
    for g in range({group}):
        at = row * {group} + g
        q = tl.load(query + at * {size} + d, mask=d < {size}, other=0).to(tl.float32) * {scale}
        {scaled}
        {found}
        found = tl.where(live, found, float("-inf"))
        tl.store(uppers + at * pages + p, found, mask=p < pages)
        top = tl.max(found, 0)
        total = tl.sum(tl.exp(found - tl.where(top > float("-inf"), top, 0.0)), 0)
        tl.store(tops + at * tl.num_programs(0) + tl.program_id(0), top)
        tl.store(totals + at * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit(do_not_specialize=["pages", "tiles"])
def order(uppers, tops, totals, used, {far_given}orders, chosen, pages, tiles, PAGES: tl.constexpr):
    """uppers [B, K, G, pages], tops and totals [B, K, G, tiles] -> orders [B, K, pages], chosen [B]; PAGES
    pages a program, of one KV head."""
    row = tl.program_id(1).to(tl.int64)
    b = row // {kv_heads}
    p = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    tokens = tl.load(used + b) + 1
    seen = (tokens + {before}) // {page}
    place = tl.arange(0, 64)
    score = tl.full([PAGES], float("-inf"), tl.float32)
    for g in range({group}):
        at = row * {group} + g
        top = tl.full([64], float("-inf"), tl.float32)
        for first in range(0, tiles, 64):
            tile = first + place
            top = tl.maximum(top, tl.load(tops + at * tiles + tile, mask=tile < tiles, other=float("-inf")))
        highest = tl.max(top, 0)
        total = tl.zeros([64], tl.float32)
        for first in range(0, tiles, 64):
            tile = first + place
            top = tl.load(tops + at * tiles + tile, mask=tile < tiles, other=float("-inf"))
            total += tl.load(totals + at * tiles + tile, mask=tile < tiles, other=0.0) * tl.exp(top - highest)
        found = tl.load(uppers + at * pages + p, mask=p < pages, other=float("-inf"))
        score = tl.maximum(score, (found - highest) - tl.log(tl.sum(total, 0)))
    always = (p == 0) | (p >= seen - {newest})
    {far}
    score = tl.where(always, float("inf"), score)
    score = tl.where((p >= seen) | (score == 0.0), tl.where(p < seen, 0.0, float("-inf")), score)
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ {last}, bits)
    tl.store(orders + row * pages + p, (bits.to(tl.int64) << 32) + ({last} - p), mask=p < pages)
    if (tl.program_id(0) == 0) & (row % {kv_heads} == 0):
        share = tokens.to(tl.float64) * tl.full([], {share}, tl.float64)
        wanted = tl.maximum(share, tl.full([], {tokens}, tl.float64))
        wanted = tl.minimum(tl.ceil(wanted * tl.full([], {each}, tl.float64)), seen.to(tl.float64))
        wanted = tl.maximum(wanted.to(tl.int32), {always}){apart}
        tl.store(chosen + b, tl.minimum(wanted, seen))
'''

#: The strides of statistics, among a function's arguments.
STRIDES = ("bounds_b", "bounds_k", "bounds_p")

_FAR = """
far = bounds + b * bounds_b + (row % {kv_heads}) * bounds_k + p.to(tl.int64) * bounds_p + {size}
far = tl.load(far, mask=p < seen, other=0).to(tl.float32)
far = tl.where(always | (p >= seen), -1.0, tl.maximum(far, 0.0)).to(tl.int32, bitcast=True)
tl.store(farthest + row * pages + p, (far.to(tl.int64) << 32) + ({last} - p), mask=p < pages)
"""


def choosing_source(kind: ChoosingKind) -> str:
    """The source of the kernels of a kind."""
    reader, size, statistic = kind.paged, kind.key_size, statistic_text(kind)
    scaled, far = kind.scaled, _FAR if kind.paged.apart else "# -"
    text = _TEXT.format(
        kv_heads=kind.kv_heads,
        group=kind.group,
        size=size,
        lanes=kind.lanes,
        page=reader.page,
        before=reader.page - 1,
        given="key_scale, " if scaled else "",
        scales=f"scale = tl.load(key_scale + k * {size} + d, mask=d < {size}, other=0)"
        if scaled
        else "# -",
        scale=repr(kind.scale),
        scaled="q *= scale" if scaled else "# -",
        begun=_block(statistic.begun, 1),
        taken=_block(statistic.taken, 2),
        stored=_block(statistic.stored, 2),
        loaded=_block(statistic.loaded, 1),
        found=_block(statistic.found, 2),
        far_given=f"bounds, farthest, {', '.join(STRIDES)}, " if reader.apart else "",
        far=_block(far.format(size=size, kv_heads=kind.kv_heads, last=LAST), 1),
        apart=f" + {reader.apart}" if reader.apart else "",
        newest=reader.always - 1,
        always=reader.always,
        last=LAST,
        share=repr(float(reader.share)),
        tokens=repr(float(reader.tokens)),
        each=repr(1 / reader.page),
    )
    text = "\n".join(line for line in text.split("\n") if line.strip() != "# -")
    return (
        f"# Which pages a query reads: {reader.text},\n"
        f"# of {kind.kv_heads} KV heads for {kind.group} query heads each, by bounds in {kind.bounds}.\n\n"
        f"import triton\nimport triton.language as tl\n\n{text}"
    )


def _block(lines: str, depth: int) -> str:
    """Lines of a statistic as they stand in a function, behind the first one's own spaces."""
    return indent(lines.strip(), depth * "    ").lstrip()
