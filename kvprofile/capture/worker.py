"""The worker extension (``worker_extension_cls``): three methods that ``collective_rpc`` reaches, no state before.

Errors leave as text, because an exception in a worker ends the engine with a traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvprofile.capture.watch import Watch


class CaptureWorker:
    """Mixed into vLLM's worker class; every name begins with kvprofile."""

    def kvprofile_start(self) -> dict[str, Any]:
        """Start watching. Gives layers, backends and the model's KV heads (G), or the problem in the way."""
        from kvprofile.capture.watch import Watch

        if _watch_of(self) is not None:
            return {"problem": "a session is open on this engine already"}
        try:
            watch = Watch(self)
            watch.attach()
        except ValueError as error:
            return {"problem": str(error)}
        vars(self)["_kvprofile_watch"] = watch
        layers = list(watch.layers.values())
        return {
            "layers": sorted(watch.layers),
            "backends": sorted({layer.attn_backend.get_name() for layer in layers}),
            "kv_heads": watch.kv_heads,
        }

    def kvprofile_take(self, key: str) -> bytes:
        """What was found under a mark's key, as ``merge`` reads it. Raises RuntimeError where no session is open."""
        watch = _watch_of(self)
        if watch is None:
            raise RuntimeError("no session is open on this engine")
        return watch.take(key)

    def kvprofile_stop(self) -> None:
        """Stop watching and forget everything."""
        watch = _watch_of(self)
        if watch is not None:
            watch.detach()
            del vars(self)["_kvprofile_watch"]


def _watch_of(worker: Any) -> Watch | None:
    watch: Watch | None = vars(worker).get("_kvprofile_watch")
    return watch
