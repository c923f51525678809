"""What runs on devices: nodes, the coordinator, and the protocol between them. Never imports torch."""

#: What gRPC has to trace (``GRPC_TRACE``) so that its lines say whose handshake has failed; see `nonn.runtime.logs`.
HANDSHAKE_TRACE = "handshaker"
