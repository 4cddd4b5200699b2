"""Triton kernels from plans: one generator for every plan, no template per variant.

    plan -> simplify, base two      plans still, which NumPy can run
         -> roles                   what each rank becomes: grid, rows, the streamed tile, lanes
         -> emit                    source: a single pass; and for splits, a pass per part and a merge
         -> kernel                  source, signature, launch, compile ahead of time

Triton itself is imported only to launch or to compile, never to generate.
"""
