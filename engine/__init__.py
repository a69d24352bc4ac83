"""The training engine: DeepSpeed, the step, teachers' EMA, checkpoints, schedules, metrics, spans."""
