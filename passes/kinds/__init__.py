"""The kinds of sites there are, a file for each: what is read, packed, computed and recorded of it.

In: matches and decisions. Out: subgraphs. The only room that knows what kind a match is of. Others are registered from
outside by ``register_site_kind``.
"""

from hire_xform.passes.kinds import dense, ffn, vocab
from hire_xform.passes.match.kinds import SiteKind, register_site_kind

__all__ = ["SiteKind", "dense", "ffn", "register_site_kind", "vocab"]
