"""The load test: a small asyncio HTTP client, two arrival processes, exact percentiles. Torch-free."""
