"""Budgets of MACs, parameters, memory and latency, solved as one knapsack."""
