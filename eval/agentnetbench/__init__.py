"""AgentNetBench: offline steps of GUI agents (OpenCUA, arXiv 2508.09123), and GUI-KV's way of running them (2510.00536)."""
