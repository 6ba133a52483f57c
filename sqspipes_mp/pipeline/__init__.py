"""What the user declares, checked: tasks, stages, queues, a run's plan. Pure."""
