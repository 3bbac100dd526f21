"""What things cost: ratios to plain loops, memory, batches; and runs that need more than a test."""
