"""The engines that run on this machine: registered, found, looked at, asked. Light: no import of brokers or tasks."""
