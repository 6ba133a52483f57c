"""The user's declarations, checked: tasks, stages, queues, a run's plan. Pure."""
