"""What changes rewards over a whole batch: gates, schedules, comparisons; one module each, see `rewards.base.Shaping`."""
