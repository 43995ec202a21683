"""What rows say: selections, tables, statistics, and claims with their verdicts."""
