"""Cascades as text that several tests use. Ranks as in FuseMax: s queries, t keys, d head, f values."""

HEADER = """einfold.cascade 1
rank s : S
rank t : T
rank d : D
rank f : F
"""

#: FuseMax, cascade of numerically stable attention: three passes over t.
NAIVE = (
    HEADER
    + """input Q[s, d]
input K[t, d]
input V[t, f]
QK[s, t] = Q[s, d] * K[t, d] :: sum(d)
GM[s] = QK[s, t] :: max(t)
SN[s, t] = exp(QK[s, t] - GM[s])
SD[s] = SN[s, t] :: sum(t)
A[s, t] = SN[s, t] / SD[s]
AV[s, f] = A[s, t] * V[t, f] :: sum(t)
output AV
"""
)

#: FuseMax, the one-pass cascade: FlashAttention-2 with the tile loop as an iterative rank.
FLASH = """einfold.cascade 1
rank i : N iterative
rank j : J
rank s : S
rank d : D
rank f : F
input Q[s, d]
input K[i, j, d]
input V[i, j, f]
RM[0, s] = -inf
RD[0, s] = 0
RNV[0, s, f] = 0
QK[i, s, j] = Q[s, d] * K[i, j, d] :: sum(d)
LM[i, s] = QK[i, s, j] :: max(j)
RM[i+1, s] = max(RM[i, s], LM[i, s])
SLN[i, s, j] = exp(QK[i, s, j] - RM[i+1, s])
SLD[i, s] = SLN[i, s, j] :: sum(j)
SLNV[i, s, f] = SLN[i, s, j] * V[i, j, f] :: sum(j)
PRM[i, s] = exp(RM[i, s] - RM[i+1, s])
RD[i+1, s] = RD[i, s] * PRM[i, s] + SLD[i, s]
RNV[i+1, s, f] = RNV[i, s, f] * PRM[i, s] + SLNV[i, s, f]
AV[s, f] = RNV[#i, s, f] / RD[#i, s]
output AV
"""


def scores(body: str, inputs: str = "", output: str = "O") -> str:
    """A cascade over the scores QK[s, t] and the values V[t, f]."""
    return (
        HEADER
        + "input Q[s, d]\ninput K[t, d]\ninput V[t, f]\n"
        + inputs
        + "QK[s, t] = Q[s, d] * K[t, d] :: sum(d)\n"
        + body
        + "".join(f"output {name}\n" for name in output.split())
    )
