"""The custom operators and their backends under one name: ``from prefixfast.attention import ops``.

The operators are the only callers of the kernels. Backends are ``triton`` (one fused kernel, on GPUs), ``torch`` (any
device; grouped by prefix and merged, with decode steps on CPUs in Rust) and ``reference`` (the specification, slow).
"""

from prefixfast.attention.backend_support import explain_backends as explain_backends
from prefixfast.attention.backends import BACKENDS as BACKENDS
from prefixfast.attention.backends import choose_backend as choose_backend
from prefixfast.attention.cross_entropy_ops import cross_entropy as cross_entropy
from prefixfast.attention.cross_entropy_ops import linear_cross_entropy as linear_cross_entropy
from prefixfast.attention.decode_ops import attn_decode as attn_decode
from prefixfast.attention.decode_ops import kv_write as kv_write
from prefixfast.attention.packed_ops import attn as attn
from prefixfast.attention.packed_ops import attn_bwd as attn_bwd
from prefixfast_kernels.tile_selection import Backend as Backend
