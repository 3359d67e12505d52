"""Durable jobs: tables with leases, dispatch by huey, the worker. What is accepted ends exactly once."""
