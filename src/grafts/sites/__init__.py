"""The places where adapters run. Nothing in here knows a method."""
