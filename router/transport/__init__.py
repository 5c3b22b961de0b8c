"""Moves frames between workers: in-process queues, Unix sockets on a node, TCP across nodes."""
