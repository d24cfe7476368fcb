"""One worker on several GPUs: rank 0 serves the queue, the others do what it does."""
