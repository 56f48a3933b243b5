"""What the plan command computes: sizes, traffic and times, without devices."""
