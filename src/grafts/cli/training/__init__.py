"""Fine-tuning runs for the command line: settings, data, tasks, the run itself and its report."""
