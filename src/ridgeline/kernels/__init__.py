"""One file per operation: the idea, a traceable torch form, and its bytes and FLOPs as functions of shape."""
