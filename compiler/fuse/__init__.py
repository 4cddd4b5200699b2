"""From regions of an ATen graph to what runs faster in their place.

    regions     parts of a graph whose reductions feed contractions
    subgraphs   a region as a graph of its own: its key, and where it may stand
    folded      a region as a cascade, folded: where every road begins
    decide      what is done with regions of a key: lowered and tried, for the backend
    replace     the lowering in the region's place, in a graph of Dynamo's
    programs    the same in a program, as its target says
    operators   attention that is an operator already, in the report
    trial       what a lowering computes and how long it takes, beside what was written
    timings     what trials measured, kept on disk
    report      one entry a region
    explain     passes before and after, and why not fewer, without replacing anything

What cannot be imported, does not fold or has no faster lowering stays as it was, and the report says why.
"""
