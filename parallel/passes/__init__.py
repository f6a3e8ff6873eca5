"""From a built program to the one that runs: recompute, fusion, order, placement in memory."""
