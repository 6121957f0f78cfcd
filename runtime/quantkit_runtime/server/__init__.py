"""An OpenAI-compatible server for what the runtime loads; needs the extra ``server``.

The HTTP process (``app``, ``routes``, ``scheduler``, ``jobs``) never touches a model. Each model lives in an
engine: one process, or a group of ranks, started and watched by ``supervisor``, running ``engine``. They talk in
the dataclasses of ``protocol`` over pipes.
"""
